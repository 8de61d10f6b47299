"""The rival's released packages: where they lie, the processes they run in, and whether they compute what we do."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from speed_ffn import COMPATIBLE, EFFICIENT, MIXLORA
from speed_shared import Case, FfnCase, ModelCase
from torch import Tensor


HERE = Path(__file__).resolve().parent

LAYERS = {"rival mola top-2 of 8": "MOLA", "rival loramoe dense 8": "LORAMOE"}


@dataclasses.dataclass(frozen=True)
class Package:
    """A release.

    Attributes:
        release: what pip installs.
        name: the folder that shows that it is there.
        methods: for each kind of case its contenders, by name, and what the other process calls them.
    """

    release: str
    name: str
    methods: dict[type, dict[str, str]]


MOE_PEFT = Package(
    "moe-peft==2.0.2",
    "moe_peft",
    {Case: LAYERS, ModelCase: LAYERS, FfnCase: {EFFICIENT: "efficient", COMPATIBLE: "compatible"}},
)
MIXLORA_PACKAGE = Package("mixlora==0.2.3", "mixlora", {FfnCase: {MIXLORA: "mixlora"}})


class Rival:
    """The process in which a package's layers run. Answers None where they cannot."""

    def __init__(self, package: Package, folder: Path) -> None:
        if not (folder / package.name).is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, package.release], check=True)
        self.package = package
        command = [sys.executable, str(HERE / "speed_rival.py"), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: object) -> float | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = next(line for line in self.process.stdout if line.startswith("seconds "))
        except (BrokenPipeError, StopIteration):
            return None
        return float(line.split()[1])

    def contenders(self, case: Case | FfnCase | ModelCase) -> dict[str, Callable[[], float | None]]:
        settings = dataclasses.asdict(case)
        methods = self.package.methods.get(type(case), {})
        for number, (name, method) in enumerate(methods.items()):
            if self.ask(prepare=name, case=settings, method=method, first=number == 0) is None:
                return {}
        return {name: lambda name=name: self.ask(run=name) for name in methods}

    def differences(self, case: FfnCase, ours: dict[str, Tensor]) -> dict[str, float]:
        """How far each of its FFN blocks is from ours on equal weights, in output and gradients.

        Raises:
            RuntimeError: if it computes another function, or nothing. Then its speed says nothing.
        """
        found = {}
        for name, method in self.package.methods.get(FfnCase, {}).items():
            with tempfile.TemporaryDirectory() as folder:
                file = str(Path(folder) / "outcome.pt")
                if self.ask(check=method, case=dataclasses.asdict(case), file=file) is None:
                    raise RuntimeError(f"{name} does not run here.")
                found[name] = difference(ours, torch.load(file))
            if found[name] > 1e-4:
                raise RuntimeError(f"{name} computes another function than ours: they differ by {found[name]:.1e}.")
        return found

    def state(self) -> str:
        """Ends the process; says whether it was still there."""
        ended = self.process.poll()
        self.process.terminate()
        self.process.wait()
        release = self.package.release
        return f"{release}, its layers alone" if ended is None else f"{release} ended with exit status {ended}"


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two outcomes, each tensor's over the largest number in ours."""
    assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
    gaps = [(ours[name].double() - theirs[name].double()).abs().max() / ours[name].abs().max() for name in ours]
    return max(float(gap) for gap in gaps)
