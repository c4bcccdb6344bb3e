"""`hydra/launcher=slurm`: the jobs of a sweep go to SLURM as one job array, and the command returns at once.

    twinsim train domain=climate/downscale -m seed=0,1,2 hydra/launcher=slurm ++scale.slurm.time=04:00:00

What SLURM is asked for stands in `scale.slurm`, the variables of each job in `scale.environment` (`twinsim.slurm.Settings` lists the
fields); a scale file of a machine with SLURM selects this launcher by itself. In `out/sweeps/VERB-HASH` lie `jobs.txt`, one plain
command a line that can be run by hand as well, the array script `sweep.sbatch`, and for each job N its output `N.out` and one marker that
tells where it stands: `N.queued`, `N.running`, `N.requeued`, `N.stopped`, `N.failed` or `N.done`, with the last line that the job said.

A job that ends with 75 was asked to stop and has saved its state: it goes back into the queue, and goes on there; not so one that was
cancelled. `twinsim status` shows how all of them stand. The same command again submits only what is neither done nor in the queue.
`scale.slurm.submit=false` writes the files and prints the command that submits them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class Slurm:
    """Nothing is set here: what depends on the machine stands in the scale file."""

    _target_: str = "hydra_plugins.twinsim_slurm.launcher.SlurmLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=Slurm, provider="twinsim")


class SlurmLauncher(Launcher):
    """Submits the jobs and returns; the verb that they run is the name of Hydra's job."""

    config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from twinsim import slurm  # Hydra looks at every plugin each time it starts

        scale = OmegaConf.to_container(self.config.scale, resolve=True)
        assert isinstance(scale, dict)
        settings = slurm.settings({str(name): value for name, value in scale.items()})
        jobs = [list(words) for words in job_overrides]
        sweeps, verb = Path(self.config.hydra.sweep.dir), self.config.hydra.job.name
        for sentence in slurm.submit(sweeps, verb, jobs, settings):
            print(sentence)
        return [JobReturn(overrides=words, status=JobStatus.COMPLETED) for words in job_overrides]
