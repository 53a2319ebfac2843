"""{{name}}: sums of two numbers."""

from dataclasses import dataclass

from cosmos_plugin import Example, Settings, dataset, option, plugin, user


@dataclass
class Options:
    """What a run may set in `[custom.{{name}}]`."""

    numbers: int = option(10, help="The numbers are 0 to one less than this.", minimum=2, maximum=1000)


plugin(name="{{name}}", version="0.1.0", summary="sums of two numbers", options=Options)


@dataset("train", role="train")
class Sums:
    """Every pair of numbers. Rows of a file or of the hub come from `cosmos_plugin.table`."""

    def __init__(self, settings: Settings) -> None:
        self.numbers = settings.own(Options).numbers

    def __len__(self) -> int:
        return self.numbers**2

    def __getitem__(self, index: int) -> Example:
        a, b = divmod(index, self.numbers)
        return Example([user(f"What is {a} + {b}? Put the result between <answer> and </answer>.")], reference=a + b)
