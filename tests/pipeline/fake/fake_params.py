from __future__ import annotations

from pathlib import Path

from llmctl import Field, Params


class MakeParams(Params):
    rows: int = Field(3, description="rows")
    word: str = Field("a", description="word")
    seed: float = Field(1.0, description="unused but in the key")
    threads: int = Field(1, affects="nothing", description="speed")
    spaces: int = Field(0, affects="nothing", description="leading blanks that are cut off again")


class UpperParams(Params):
    sleep: float = Field(0.0, affects="nothing", description="seconds")
    mark: str = Field("", description="appended")


class ScoreParams(Params):
    score: float = Field(1.0, description="reported")
    name: str = Field("score", description="its name")


class CountParams(Params):
    max_steps: int = Field(10, affects="extent", description="steps")
    pause: float = Field(0.0, affects="nothing", description="seconds per step")
    start: int = Field(0, description="first value")


class LearnParams(Params):
    max_steps: int = Field(10, affects="extent", description="steps")
    fault: str = Field("", description="what is wrong with its checkpoints")


class WrongParams(Params):
    how: str = Field("raise", description="what to do")
    size: int = Field(1, description="bytes, steps or seconds")
    path: Path | None = Field(None, description="file to write a pid to")


class FlakyParams(Params):
    path: Path = Field(description="file that counts the attempts")
    good: int = Field(2, description="the attempt that succeeds")
    how: str = Field("raise", description="how the others end")


class LeakParams(Params):
    where: str = Field("print", description="where the secret goes")
    variable: str = Field("TOKEN", description="the variable that holds it")


class GangParams(Params):
    how: str = Field("fine", description="what rank 1 does")
    count: int = Field(2, affects="nothing", description="processes")
    again: int = Field(0, affects="nothing", description="restarts")

    def processes(self) -> int:
        return self.count

    def restarts(self) -> int:
        return self.again


class PushParams(Params):
    path: str = Field("", description="file to append to")
