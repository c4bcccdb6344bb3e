"""World models and planning: linear systems are recovered, disagreement tells what is unknown, plans come to known optima."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from building import built, rough_jit
from flax import nnx

from domains.robotics import arm, dynamics, imagined, planning, push, push_view, worlds
from domains.robotics.push import PlanarPush
from domains.robotics.tasks import LATEST, Scene, reached
from generators.world_model import Ensemble, Plain, Prediction, WorldModel, simnorm
from twinsim import cli, run, train
from twinsim.base import BadInput, Example, Spec

A, B = np.array([[0.9, 0.2], [-0.3, 0.8]], np.float32), np.array([[0.0], [0.5]], np.float32)
STEPS = 6
SPEC = Spec((STEPS,), 2, 1, 2, (False,))


def linear(seen, action):
    return A @ seen + B @ action


@pytest.fixture(scope="module")
def learnt():
    """A world model of the linear system, trained on states and actions within [-1, 1]."""
    noise = np.random.default_rng(0)
    now, actions = noise.uniform(-1, 1, (2048, 2)).astype(np.float32), noise.uniform(-1, 1, (2048, STEPS, 1)).astype(np.float32)
    path = [now]
    for step in range(STEPS):
        path.append(path[-1] @ A.T + actions[:, step] @ B.T)
    examples = Example(np.stack(path[1:], 1), actions, now)
    module = built(lambda: WorldModel(SPEC, partial(Ensemble, width=24, depth=1), Plain(0.5), unroll=3, rngs=nnx.Rngs(0)))
    assemble, params = train.split(module)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 800))

    @rough_jit
    def fitted(params):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (64,), 0, len(now))
            batch = jax.tree.map(lambda part: jnp.asarray(part)[rows], examples)
            keys = jax.random.split(key, 64)
            loss = lambda params: jax.vmap(assemble(params).loss)(batch, keys).mean()  # noqa: E731
            with jax.numpy_dtype_promotion("standard"):
                change, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, change), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), 800))[0][0]

    return assemble(fitted(params))


def test_linear_system_is_recovered(learnt):
    """What is predicted, and the slopes of a step, are those of the closed form."""
    now, actions = jnp.array([0.4, -0.6]), jnp.array([[0.3], [-0.5], [0.8], [0.0], [-0.9], [0.1]])
    truth, state = [], now
    for action in actions:
        state = linear(state, action)
        truth.append(state)
    told = rough_jit(lambda: learnt.predict(now, actions))()
    np.testing.assert_allclose(told.mean, np.stack(truth), atol=0.04)

    def step(seen, action):
        return learnt.decode(learnt.step(learnt.encode(seen), action))

    slopes = rough_jit(jax.jacobian(step, (0, 1)))(jnp.zeros(2), jnp.zeros(1))
    np.testing.assert_allclose(slopes[0], A, atol=0.06)
    np.testing.assert_allclose(slopes[1], B, atol=0.06)


def test_members_disagree_where_nothing_was_seen(learnt):
    spread = rough_jit(jax.vmap(lambda seen: learnt.predict(seen, jnp.zeros((STEPS, 1))).spread.mean()))
    inside, outside = spread(jnp.array([[0.3, 0.3], [-0.5, 0.2]])), spread(jnp.array([[4.0, 4.0], [-4.0, 3.0]]))
    assert float(outside.min()) > 5 * float(inside.max())


def test_a_draw_keeps_to_one_member(learnt):
    now, actions = jnp.array([2.0, -2.0]), jnp.ones((STEPS, 1))
    members = rough_jit(lambda: learnt.predict(now, actions).members)()
    draw = rough_jit(lambda key: learnt.sample(actions, now, key))
    for seed in range(4):
        drawn = draw(jax.random.key(seed))
        assert sum(bool(jnp.allclose(drawn, each, atol=1e-6)) for each in members) == 1
    with pytest.raises(BadInput, match="no constraints"):
        learnt.sample(actions, now, jax.random.key(0), [object()])


def test_stepping_is_what_one_member_predicts():
    """With one member, steps, one by one, and rollouts are the same; also with a hidden code, which stays normalised, and a context."""
    spec = Spec((STEPS,), 2, 1, 3, (False,))
    model = built(lambda: WorldModel(spec, partial(Ensemble, width=8, depth=1), members=1, hidden=16, rngs=nnx.Rngs(1)))
    now, context, actions = jnp.array([0.1, 0.2]), jnp.array([0.7]), jnp.linspace(-1, 1, STEPS)[:, None]

    @rough_jit
    def both():
        told = model.predict(now, actions, context)
        example = Example(told.mean, actions, jnp.concatenate([now, context]))
        latents = jax.lax.scan(lambda latent, action: (model.step(latent, action),) * 2, model.encode(now, context), actions)[1]
        return told.mean, latents, model.loss(example, jax.random.key(0))

    told, latents, loss = both()
    np.testing.assert_allclose(latents.seen, told, atol=1e-5)
    np.testing.assert_allclose(latents.hidden.reshape(STEPS, 2, 8).sum(-1), 1, atol=1e-5)
    assert 0 < float(loss) < 1  # of the hidden code alone, since what is seen is what is predicted
    np.testing.assert_allclose(simnorm(np.zeros(16)), 1 / 8)


@pytest.mark.parametrize("wrong", [{"hidden": 3}, {"members": 0}, {"discount": 0.0}, {"tolerance": -1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match="world model: expected"):
        WorldModel(SPEC, Ensemble, rngs=nnx.Rngs(0), **wrong)


def test_spec_without_what_is_seen_before_is_refused():
    with pytest.raises(BadInput, match="actions as fields"):
        WorldModel(Spec((STEPS,), 2, 0, 2, (False,)), Ensemble, rngs=nnx.Rngs(0))


# ---------------------------------------------------------------- planning


@pytest.mark.parametrize("method", ["cem", "mppi"])
def test_planner_finds_the_optimum_of_a_linear_quadratic_problem(method):
    """Its plan costs what the least-squares solution does, within one per cent of what can be gained."""
    horizon, weight = 5, 0.1
    start = np.array([[1.0, -0.5], [0.5, 2.0]])

    def cost(seen, actions):
        return (seen**2).sum((-1, -2)) + weight * (actions**2).sum((-1, -2))

    powers = [np.linalg.matrix_power(A.astype(float), k) for k in range(horizon + 1)]
    blocks = [[powers[i - j] @ B if j <= i else np.zeros((2, 1)) for j in range(horizon)] for i in range(horizon)]
    toward, free = np.block(blocks), np.concatenate(powers[1:])
    best = np.linalg.solve(toward.T @ toward + weight * np.eye(horizon), -toward.T @ free @ start.T).T[:, None, :, None]
    planner = planning.Planner(method=method, horizon=horizon, stride=1, samples=256, iterations=12, spread=1.0, temperature=0.1)
    imagine = planning.stepping(linear)
    limits = np.full(1, -5.0), np.full(1, 5.0)
    found = planning.plan(planner, imagine, cost, start, start, limits, np.random.default_rng(0))[:, None]
    least, idle, ours = (cost(imagine(start, start, actions), actions)[:, 0] for actions in (best, 0 * best, found))
    assert (ours >= least - 1e-4).all() and ((ours - least) < 0.01 * (idle - least)).all()


def test_warm_start_is_never_worse():
    start, limits = np.array([[1.0, -0.5]]), (np.full(1, -5.0), np.full(1, 5.0))
    planner = planning.Planner(horizon=5, stride=1, samples=4, iterations=1)
    imagine = planning.stepping(linear)

    def cost(seen, actions):
        return (seen**2).sum((-1, -2))

    warm = np.array([[[0.5], [0.2], [0.0], [0.0], [0.0]]])
    found = planning.plan(planner, imagine, cost, start, start, limits, np.random.default_rng(0), warm)
    assert cost(imagine(start, start, found[:, None]), None) <= cost(imagine(start, start, warm[:, None]), None)


def test_planner_settings_are_checked():
    for wrong in ({"method": "lqr"}, {"stride": 20}, {"samples": 1}, {"temperature": 0.0}):
        with pytest.raises(BadInput, match="planner:"):
            planning.Planner(**wrong)


def test_simulator_imagines_what_then_happens():
    """The state that planning sets out from is the whole state: what is imagined is seen, to the last bits of float32.

    Also where a slow line still has to carry out what was sent before.
    """
    task = PlanarPush()
    scene = Scene(task)
    start, world = task.draw(np.random.default_rng(0), 2, "wide"), np.stack([worlds.world(), worlds.world({"latency": 2.0})])
    imagine = planning.in_simulator(scene, start, world, 3)
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 3, 4, 2)).astype(np.float32)
    sent = np.zeros((2, LATEST, 2), np.float32)
    state, sent, _ = scene.advance(scene.begin(start, world), sent, start, world, lambda frame, _: actions[:, 0, frame], 3)
    told = imagine((state, sent), np.zeros((2, 12)), actions)
    for sample in range(3):
        then = scene.advance(state, sent, start, world, lambda frame, _: actions[:, sample, frame], 4)[2]  # noqa: B023
        np.testing.assert_allclose(then.after, told[:, sample], atol=1e-6)


def test_what_is_pursued_is_what_the_sent_actions_come_to():
    """Also where sensors fail, of which the planner is told the same as the record keeps."""
    task = PlanarPush()
    scene, planner = Scene(task), planning.Planner(horizon=3, stride=2, samples=4, iterations=1)
    start = task.draw(np.random.default_rng(0), 2, "wide")
    world = np.stack([worlds.world(), worlds.world({"noise": 2.0})])
    real, told = planning.in_simulator(scene, start, world, 4), []

    def imagine(state, seen, actions):
        told.append(seen)
        return real(state, seen, actions)

    played = planning.pursue(planner, scene, start, world, imagine, planning.push_cost, 0, 5)
    assert played.action.shape == (2, 5, 2) and played.seen.shape == played.observation.shape == (2, 5, 12)
    again = scene.replay(start, world, played.action)
    np.testing.assert_array_equal(again.after, played.after)
    np.testing.assert_allclose(np.stack(told, 1), again.seen[:, ::2], atol=1e-5)
    assert np.abs(again.seen[1] - again.observation[1]).max() > 1e-4


def test_cost_is_least_where_the_puck_is_at_its_goal():
    seen = np.zeros((1, 3, 1, 12))
    seen[..., 6], seen[..., 10] = 0.4, 0.6
    seen[0, 0, 0, 4:6], seen[0, 1, 0, 4:6] = (0.3, 0.0), (0.5, 0.0)  # behind the puck, and before it
    seen[0, 2, 0, 4:7] = 0.5, 0.0, 0.6  # it is there
    cost = planning.push_cost(seen, seen[..., :2])
    assert cost.shape == (1, 3) and cost[0, 2] == 0 < cost[0, 0] < cost[0, 1]


# ---------------------------------------------------------------- the planar push as a model sees it


def test_view_has_the_arm_of_the_task():
    noise = np.random.default_rng(0)
    joints = np.stack([noise.uniform(-2.0, 2.0, 20), noise.uniform(0.3, 2.6, 20)], 1)
    places = push.hand(joints)
    seen = rough_jit(jax.vmap(lambda joints, place: (push_view.hand(joints), push_view.joints_at(place))))
    hand, back = seen(joints.astype(np.float32), places.astype(np.float32))
    np.testing.assert_allclose(hand, places, atol=1e-5)
    np.testing.assert_allclose(back, push.joints_at(places), atol=1e-3)


def test_puck_out_of_reach_stays_and_one_that_slides_is_slowed_down_as_simulated():
    task, view = PlanarPush(), push_view.PushView()
    stepper, moved = Scene(task).stepper(worlds.world()[None]), rough_jit(view.moved)
    mean, scale = np.array(view.mean, np.float32), np.array(view.scale, np.float32)
    for drift in ([0.0, 0.0], [0.25, -0.08]):
        position = np.array([[*push.joints_at(np.array(push.HOME)), 0.5, 0.2]])
        stepper.place(position, np.array([[0.0, 0.0, *drift]]))
        start = {name: np.zeros(1) for name in task.start}
        seen = task.observe(stepper, start)
        stepper.step(task.control(seen, np.zeros((1, 2))), task.steps)
        after = task.observe(stepper, start)[0, :10]
        told = moved(jnp.asarray((seen[0, :10] - mean) / scale, jnp.float32), jnp.zeros(2), jnp.ones(8))
        told = np.asarray(told) * scale + mean
        np.testing.assert_allclose(told[6:8], after[6:8], atol=1e-3)  # it slides 9 mm
        np.testing.assert_allclose(told[8:10], after[8:10], atol=0.02)
        assert drift[0] or np.allclose(told[6:8], seen[0, 6:8], atol=1e-6)


def test_features_do_not_depend_on_where_the_push_is():
    """Turned by a right angle about the arm's foot, with the action, everything looks the same."""
    view = push_view.PushView()
    mean, scale = np.array(view.mean), np.array(view.scale)
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
    joints, puck, drift, action = np.array([-1.2, 1.5]), np.array([0.52, -0.1]), np.array([0.05, 0.1]), np.array([0.4, 0.7])
    turned = joints + [np.pi / 2, 0.0]
    features, look = [], rough_jit(view.features)
    for each, rotate in ((joints, np.eye(2)), (turned, quarter)):
        seen = np.concatenate([each, [0.3, -0.2], push.hand(each), rotate @ puck, rotate @ drift])
        features.append(look(jnp.asarray((seen - mean) / scale, jnp.float32), jnp.asarray(rotate @ action, jnp.float32)))
    np.testing.assert_allclose(*features, atol=1e-3)


# ---------------------------------------------------------------- the domain, and the model in the simulator's place


@pytest.fixture(scope="module")
def small():
    task = PlanarPush()
    return dynamics.Dynamics("push", task, dynamics.mixed(task, 3, 3), window=20, still=("goal_x", "goal_y"), view=push_view.PushView())


def test_linear_baseline_is_exact_where_the_world_is_linear(small):
    task = small.task
    noise = np.random.default_rng(0)
    mix, push_ = 0.05 * noise.standard_normal((12, 12)) - 0.3 * np.eye(12), 0.1 * noise.standard_normal((2, 12))
    seen, done = [noise.standard_normal((6, 12))], noise.uniform(-1, 1, (6, 30, 2))
    for step in range(30):
        seen.append(seen[-1] + seen[-1] @ mix + done[:, step] @ push_)
    record = dynamics.Record(np.stack(seen, 1), done, 3, "made up")
    domain = dynamics.Dynamics("linear", task, record, window=5)
    question, truth = domain.exam(2)
    told = domain.baselines(domain.fit())["linear"](question.condition, 2, 0)
    np.testing.assert_allclose(told["motion"][0], truth["motion"], atol=0.01)


class Still:
    """A model in which nothing ever moves."""

    def encode(self, seen):
        return seen

    def step(self, latent, action):
        return latent

    def decode(self, latent):
        return latent

    def predict(self, seen, actions):
        mean = jnp.repeat(seen[None], len(actions), 0)
        return Prediction(mean, 0 * mean, mean[None])


def test_model_is_played_as_a_scene_is(small):
    statistics = small.fit()
    stepper = imagined.ModelStepper(small, statistics, lambda params: Still(), {})
    start, world = small.task.draw(np.random.default_rng(0), 2, "wide"), np.repeat(worlds.world()[None], 2, 0)
    policy = lambda frame, seen: small.task.demonstrate(seen)  # noqa: E731
    played, real = stepper.play(start, world, policy, 4), small.scene.play(start, world, policy, 4)
    assert all(getattr(played, name).shape == getattr(real, name).shape for name in vars(real))
    np.testing.assert_allclose(played.observation[:, 0], real.observation[:, 0], atol=1e-6)
    np.testing.assert_allclose(played.last, real.observation[:, 0], atol=1e-5)
    told = stepper.imagine(np.zeros((2, 1)), played.last, np.zeros((2, 3, 4, 2)))
    assert told.shape == (2, 3, 4, 12) and np.allclose(told, played.last[:, None, None], atol=1e-5)
    mean, spread = stepper.predict(played.last, np.zeros((2, 4, 2)))
    assert mean.shape == (2, 4, 12) and not spread.any()
    with pytest.raises(BadInput, match="own world"):
        stepper.play(start, np.repeat(worlds.world({"friction": 0.5})[None], 2, 0), policy, 4)


def test_questions_are_checked(small):
    told = {"title": "t", "domain": "push", "asks": "a", "command": "c", "takes": "t", "expect": "e", "members": 2}

    def ask(**more):
        return small.ask(dynamics.DynamicsScenario(**told, **{"actions": [[0.0, 1.0]], **more}), None)

    question = ask(starts=3, begin={"puck_x": 0.5})
    assert question.condition["actions"].shape == (3, 20, 2) and np.allclose(question.condition["now"][:, 6], 0.5)
    for wrong, said in (
        ({"actions": [[0.0]]}, "2 numbers each"),
        ({"actions": [[0.0, 2.0]]}, "move_y: expected -1 to 1, got 2 at step 0"),
        ({"actions": [[0.0, 1.0]] * 21}, "at most 20, got 21"),
        ({"begin": {"puck": 0.1}}, "begin: puck"),
    ):
        with pytest.raises(BadInput, match=said):
            ask(**wrong)


def test_any_task_can_be_learnt():
    task = arm.ArmReach()
    domain = dynamics.Dynamics("reach", task, dynamics.mixed(task, 3, 3), window=10)
    statistics = domain.fit()
    (example, *_), spec = domain.examples(statistics), domain.spec(statistics)
    assert example.target.shape[1:] == (*spec.grid, spec.channels) and example.scalars.shape[1] == spec.scalars == len(task.observation)
    np.testing.assert_allclose(example.target.std((0, 1)).max(), 1, atol=0.5)
    question, truth = domain.exam(2)
    drawn = domain.baselines(statistics)["linear"](question.condition, 2, 0)
    (section,) = domain.sections(asked=None, question=question, dataset=domain.dataset_of(drawn, question), rules={}, evaluation=None)
    assert [picture[:4] for picture in section.figures.values()] == [b"\x89PNG"]  # of tool and goal, which have three coordinates
    tables = [
        domain.score(draw(question.condition, 2, 0), truth, question.condition).table for draw in domain.baselines(statistics).values()
    ]
    assert all(table.keys() == tables[0].keys() for table in tables)


@pytest.mark.slow
def test_demonstrator_succeeds_in_the_model_as_it_does_in_the_simulator(tmp_path):
    """And one plans in it, whose plans then succeed in the simulator; with a fraction of the episodes and of the training."""
    words = ["domain=robotics/push_model", f"out={tmp_path}", "train.steps=300", "domain.record.count=45", "domain.record.held_out=6"]
    with jax.numpy_rank_promotion("allow"):
        model = run.training(run.resolve(cli._compose(words)), lambda name: contextlib.nullcontext(lambda *_: None))
        stepper = imagined.trained(model.domain, model)
        task, scene, many = stepper.task, stepper.domain.scene, 20
        start, world = task.draw(np.random.default_rng(5), many, "wide"), np.repeat(worlds.world()[None], many, 0)
        policy = lambda frame, seen: task.demonstrate(seen)  # noqa: E731
        real, ours = (reached(task, each.play(start, world, policy).after)[1] for each in (scene, stepper))
        assert real.mean() > 0.9 and abs(ours.mean() - real.mean()) < 0.15
        planner = planning.Planner(samples=32, iterations=2)
        part, few = {name: values[:5] for name, values in start.items()}, world[:5]
        planned = planning.pursue(planner, scene, part, few, stepper.imagine, planning.push_cost, 0, 90)
        assert reached(task, planned.after)[1].mean() >= 0.6
