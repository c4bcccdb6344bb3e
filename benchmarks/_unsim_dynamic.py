"""What UNsim takes for a case that `city_dynamic.py` wrote: runs in UNsim's own environment and prints one line of JSON.

Its forward run is timed as it is fastest, its gradient as its documentation advises (`duo_logit`, checkpoints), compilation apart.
"""

import json
import resource
import sys
import time

import jax
import numpy as np
import unsim.unsim_diff as peer
from unsim import World

CHECKPOINT = 20  # steps


def main() -> int:
    case = dict(np.load(sys.argv[1]))
    world = World(
        name="", deltat=float(case["dt"]), tmax=float(case["duration"]), print_mode=0, save_mode=0, show_mode=0, route_choice="duo_logit"
    )
    for node in range(int(case["nodes"])):
        world.addNode(str(node), 0, 0)
    for link, (a, b) in enumerate(zip(case["start"], case["end"], strict=True)):
        world.addLink(
            f"link{link}", str(a), str(b), length=case["length"][link], free_flow_speed=case["speed"][link],
            capacity=case["capacity"][link] / 3600, jam_density=case["jam_density"][link],
        )  # fmt: skip
    trips, until = case["trips"], float(case["until"])
    for zone in np.flatnonzero(trips.sum(1) > 0):  # it loads demand only at nodes without links in
        world.addNode(f"origin{zone}", 0, 0)
        world.addLink(
            f"stub{zone}", f"origin{zone}", str(case["zone"][zone]), length=1000, free_flow_speed=20, capacity=10.0, jam_density=2.0
        )
    for a, b in np.argwhere(trips > 0):
        world.adddemand(f"origin{a}", str(case["zone"][b]), 0, until, trips[a, b] / 3600)
    world.finalize_scenario()
    given, layout = peer.world_to_jax(world)
    result: dict = {"links": layout.n_links, "steps": layout.tsize, "destinations": layout.n_dests}
    for name in ("duo", "duo_logit"):
        of_kind = layout._replace(use_logit=name == "duo_logit")

        def forward(p, of_kind=of_kind):  # noqa: ANN001, ANN202
            state = peer.simulate_duo(p, of_kind, differentiable=False)
            return peer.total_travel_time(state, of_kind), peer.trip_completed(state, of_kind)

        result[name] = timed(forward, given)
        result[name]["vehicle_hours"], result[name]["ended"] = (float(x) for x in result[name].pop("answer"))
        result[name]["vehicle_hours"] /= 3600

    def gradient(toll):  # noqa: ANN001, ANN202
        def total(x):  # noqa: ANN001, ANN202
            return peer.total_travel_time(peer.simulate_duo(given._replace(toll=x), layout, checkpoint_every=CHECKPOINT), layout)

        return jax.grad(total)(toll)

    result["gradient"] = timed(gradient, given.toll, repeats=1)
    slope = np.asarray(result["gradient"].pop("answer"))
    result["gradient"]["finite"] = bool(np.isfinite(slope).all())
    result["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps(result))
    return 0


def timed(call, given, repeats=2):  # noqa: ANN001, ANN201
    """CPU seconds to compile and to run."""
    began = time.process_time()
    run = jax.jit(call).lower(given).compile()
    result = {"compile_s": time.process_time() - began, "cpu_s": float("inf")}
    for _ in range(repeats):
        began = time.process_time()
        result["answer"] = jax.block_until_ready(run(given))
        result["cpu_s"] = min(result["cpu_s"], time.process_time() - began)
    return result


if __name__ == "__main__":
    sys.exit(main())
