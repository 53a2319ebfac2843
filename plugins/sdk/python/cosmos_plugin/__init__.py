"""Datasets, rewards and environments for cosmos-host.

    from cosmos_plugin import Sample, plugin, reward

    plugin(name="short", version="0.1.0", summary="rewards short answers")

    @reward("short", role="train")
    def score(sample: Sample) -> float:
        return 1.0 if len(sample.completion) < 100 else 0.0

`cosmos-host plugin build` makes a component of it. Modules must be imported at the top of a file: the component holds
what was imported while it was built, and has no files to import from later.
"""

from ._errors import SampleError
from ._registry import dataset, environment, plugin, reward
from ._settings import DatasetSettings, Settings, option
from ._types import (
    Action,
    Dataset,
    DatasetRole,
    Environment,
    Example,
    Message,
    Opened,
    Outcome,
    RewardRole,
    Sample,
    Score,
    Start,
    assistant,
    system,
    user,
)

__all__ = [
    "Action",
    "Dataset",
    "DatasetRole",
    "DatasetSettings",
    "Environment",
    "Example",
    "Message",
    "Opened",
    "Outcome",
    "RewardRole",
    "Sample",
    "SampleError",
    "Score",
    "Settings",
    "Start",
    "assistant",
    "dataset",
    "environment",
    "option",
    "plugin",
    "reward",
    "system",
    "user",
]
