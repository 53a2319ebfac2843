"""The SDK under plain Python: `python3 -m unittest discover -s tests` in the SDK's folder."""

from __future__ import annotations

import enum
import json
import random
import unittest
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, Optional

import cosmos_plugin as sdk
from cosmos_plugin import _host, chat_template, log, table, testing


@dataclass
class Options:
    bonus: float = sdk.option(0.5, help="added for nothing", minimum=0, maximum=1)
    mode: Literal["soft", "hard"] = "soft"
    words: list[str] = sdk.option(["a"])
    limit: Optional[int] = None


class Case(unittest.TestCase):
    def setUp(self) -> None:
        testing.reset()

    def failure(self, call: Any, *args: Any, **named: Any) -> str:
        with self.assertRaises(testing.PluginFailed) as caught:
            call(*args, **named)
        return str(caught.exception)


class Rewards(Case):
    def test_function_with_and_without_settings_and_class(self) -> None:
        sdk.plugin(name="p", version="1", options=Options)

        @sdk.reward("plain")
        def plain(sample: sdk.Sample) -> float:
            return float(sample.reference["x"])

        @sdk.reward("given", role="validation")
        def given(sample: sdk.Sample, settings: sdk.Settings) -> sdk.Score:
            return sdk.Score(settings.own(Options).bonus, {"chars": len(sample.completion)})

        @sdk.reward("made", role="filter")
        class Made:
            def __init__(self, settings: sdk.Settings) -> None:
                self.words = settings.own(Options).words

            def __call__(self, sample: sdk.Sample) -> bool:
                return sample.metadata["word"] in self.words

        self.assertEqual(testing.score("plain", completion="", reference={"x": 2}).value, 2.0)
        custom = {"custom": {"p": {"bonus": 1}}}
        self.assertEqual(testing.score("given", completion="abc", settings=custom), sdk.Score(1.0, {"chars": 3.0}))
        self.assertEqual(testing.score("made", completion="", metadata={"word": "a"}).value, 1.0)

    def test_an_exception_is_the_error_of_its_sample_with_type_message_and_line(self) -> None:
        sdk.plugin(name="p", version="1")

        @sdk.reward("r")
        def score(sample: sdk.Sample) -> float:
            if sample.completion == "give up":
                raise sdk.SampleError("no reference")
            if sample.completion == "leave":
                raise SystemExit(3)
            if sample.completion == "nothing":
                return None  # type: ignore[return-value]
            return 1 / len(sample.completion)

        reward = testing.export("reward")
        reward.init("r", "{}")
        sample = {"prompt": "", "reference": "", "metadata": []}
        texts = ["", "ab", "give up", "leave", "nothing"]
        made = reward.score_batch([SimpleNamespace(completion=text, **sample) for text in texts])
        self.assertRegex(made[0].value.message, r"^ZeroDivisionError: .* \(.*test_sdk\.py:\d+ in `score`\)$")
        self.assertEqual(made[1].value.value, 0.5)
        self.assertEqual(made[2].value.message, "no reference")
        self.assertIn("SystemExit: 3", made[3].value.message)
        self.assertIn("TypeError: the reward returned None", made[4].value.message)

    def test_random_numbers_do_not_depend_on_earlier_samples(self) -> None:
        sdk.plugin(name="p", version="1")
        sdk.reward("r")(lambda sample: random.random())
        first = testing.score("r", completion="")
        self.assertEqual(first, testing.score("r", completion=""))

    def test_settings_are_checked(self) -> None:
        sdk.plugin(name="p", version="1", options=Options)

        @sdk.reward("r")
        def score(sample: sdk.Sample, settings: sdk.Settings) -> float:
            return settings.own(Options).bonus

        for own, said in [
            ({"bonsu": 1}, "did you mean `bonus`"),
            ({"bonus": "x"}, '`custom.p.bonus` is "x", not a number'),
            ({"bonus": 2}, "above 1"),
            ({"bonus": True}, "not a number"),
            ({"mode": "odd"}, 'choose "soft" or "hard"'),
            ({"words": [1]}, "`custom.p.words[0]`"),
            ({"words": "a"}, "not a list"),
            ({"limit": 1.5}, "not a whole number"),
        ]:
            self.assertIn(said, self.failure(testing.score, "r", completion="", settings={"custom": {"p": own}}))
        wrong = self.failure(testing.score, "r", completion="", settings={"custom": {"p": {"bonus": 2}}})
        self.assertEqual(wrong, "`custom.p.bonus` is 2.0, above 1")
        self.assertIn("choose `r`", self.failure(testing.score, "other", completion=""))
        self.assertEqual(testing.score("r", completion="", settings={"custom": {"p": {"limit": None}}}).value, 0.5)


class Declarations(Case):
    def test_describe(self) -> None:
        sdk.plugin(name="p", version="1", summary="s", options=Options, wants=["dir:/data:ro"])
        sdk.reward("r", role="filter")(lambda sample: 1.0)
        sdk.dataset("d", role="validation")(lambda settings: [])
        made = testing.export("metadata", ["log"]).describe()
        self.assertEqual((made.name, made.version, made.summary), ("p", "1", "s"))
        self.assertEqual((made.rewards[0].name, made.rewards[0].role.name), ("r", "FILTER"))
        self.assertEqual((made.datasets[0].name, made.datasets[0].role.name), ("d", "VALIDATION"))
        self.assertEqual(made.wants, ["log", "dir:/data:ro"])
        own = json.loads(made.settings_schema)["properties"]["custom"]["properties"]["p"]
        self.assertFalse(own["additionalProperties"])
        bonus = {"type": "number", "default": 0.5, "description": "added for nothing", "minimum": 0, "maximum": 1}
        self.assertEqual(own["properties"]["bonus"], bonus)
        self.assertEqual(own["properties"]["mode"], {"enum": ["soft", "hard"], "default": "soft"})
        self.assertEqual(own["properties"]["limit"]["type"], ["integer", "null"])

    def test_mistakes_are_said(self) -> None:
        with self.assertRaises(SystemExit) as caught:
            testing.export("metadata")
        self.assertIn("call `plugin(", str(caught.exception))
        with self.assertRaisesRegex(ValueError, "plugin's name"):
            sdk.plugin(name="a b", version="1")
        sdk.plugin(name="p", version="1")
        with self.assertRaisesRegex(ValueError, "called twice"):
            sdk.plugin(name="q", version="1")
        with self.assertRaisesRegex(ValueError, "is no role"):
            sdk.reward("r", role="test")  # type: ignore[arg-type]
        sdk.reward("r")(lambda sample: 1.0)
        with self.assertRaisesRegex(ValueError, "declared twice"):
            sdk.reward("r")(lambda sample: 1.0)

    def test_options_must_have_defaults_and_plain_types(self) -> None:
        @dataclass
        class Bad:
            x: int

        with self.assertRaisesRegex(TypeError, "no default"):
            sdk.plugin(name="p", version="1", options=Bad)
        with self.assertRaisesRegex(TypeError, "not a dataclass"):
            testing.reset()
            sdk.plugin(name="p", version="1", options=int)


class Datasets(Case):
    def test_rows_become_examples(self) -> None:
        sdk.plugin(name="p", version="1")

        @sdk.dataset("d")
        class Rows:
            def __init__(self, settings: sdk.Settings) -> None:
                self.rows = table.open(settings.dataset, columns=["q"])
                self.count = settings.dataset.limit(len(self.rows))

            def __len__(self) -> int:
                return self.count

            def __getitem__(self, index: int) -> sdk.Example:
                row = self.rows[index]
                if row["q"] is None:
                    return sdk.Example("text")
                return sdk.Example([sdk.user(row["q"])], reference={"i": index}, metadata={"k": "v"})

        settings = {"dataset": {"name": "n", "split": "train", "test_size": 3}}
        self.assertIn("add it to `imports`", self.failure(testing.examples, "d", settings=settings))
        testing.lend_table([{"q": None if index == 1 else str(index), "other": 0} for index in range(100)])
        made = testing.examples("d", settings=settings)
        self.assertEqual(len(made), 3)
        self.assertEqual(made[0], sdk.Example([sdk.user("0")], {"i": 0}, None, {"k": "v"}))
        self.assertEqual((made[1].prompt, made[1].reference), ("text", None))
        self.assertIn("IndexError: example 100 of 3", self.failure(testing.examples, "d", [100], settings=settings))
        self.assertEqual(len(list(table.open("n"))), 100)
        with self.assertRaisesRegex(IndexError, "row 100 of 100"):
            table.open("n")[100]
        with self.assertRaisesRegex(ValueError, "no column `z`; it has q, other"):
            table.open("n", columns=["z"])
        self.assertIn("`dataset.name` is empty", self.failure(testing.examples, "d"))


class Environments(Case):
    def test_state_travels(self) -> None:
        sdk.plugin(name="p", version="1")

        @sdk.environment("e")
        class Count:
            def __init__(self, settings: sdk.Settings) -> None:
                pass

            def reset(self, start: sdk.Start) -> sdk.Opened:
                return sdk.Opened([sdk.system("s"), *start.messages], [{"name": "t"}], {"left": start.reference["n"]})

            def step(self, action: sdk.Action) -> sdk.Outcome:
                left = action.state["left"] - 1
                if left == 0:
                    return sdk.Outcome(done=True, reward=1, metrics={"turns": action.turn})
                return sdk.Outcome([sdk.user("go on")], state={"left": left})

        environment = testing.export("environment")
        environment.init("e", "")
        message = SimpleNamespace(role="user", content="q")
        start = SimpleNamespace(messages=[message], reference='{"n": 2}', metadata=[])
        opened = environment.reset_batch([start])[0].value
        self.assertEqual([one.role for one in opened.messages], ["system", "user"])
        self.assertEqual((json.loads(opened.tools), json.loads(opened.state)), ([{"name": "t"}], {"left": 2}))
        first = SimpleNamespace(state=opened.state, completion="a", turn=0, complete=True)
        outcome = environment.step_batch([first])[0].value
        self.assertEqual((outcome.done, json.loads(outcome.state)), (False, {"left": 1}))
        # A component gets lists of bytes as `bytes`, and an empty one for no state.
        last = SimpleNamespace(state=outcome.state, completion="b", turn=1, complete=True)
        broken = SimpleNamespace(state=b"", completion="b", turn=1, complete=True)
        ended, failed = environment.step_batch([last, broken])
        self.assertEqual((ended.value.done, ended.value.reward, ended.value.state), (True, 1.0, b""))
        self.assertIn("TypeError", failed.value.message)


class Host(Case):
    def test_log(self) -> None:
        with self.assertRaisesRegex(Exception, "`log` is not lent here"):
            log.info("x")
        lines: list[str] = []
        testing.lend_log(lines)
        log.info("x")
        log.warn("y")
        self.assertEqual(lines, ["info: x", "warn: y"])
        _host.hold()
        with self.assertRaisesRegex(Exception, "not there while the plugin is built"):
            log.info("z")
        sdk.plugin(name="p", version="1")
        testing.export("metadata").describe()
        log.info("z")
        self.assertEqual(lines[2:], ["info: z"])

    def test_chat_template_passes_options_and_the_hosts_error(self) -> None:
        asked: list[Any] = []

        class Refused(Exception):
            value = "no template"

        def render(messages: list[Any], add: bool, options: str) -> str:
            asked.append((messages[0].content, add, json.loads(options)))
            if not add:
                raise Refused
            return "text"

        _host.lend("types", SimpleNamespace(Message=SimpleNamespace))
        _host.lend("chat-template", SimpleNamespace(render=render))
        self.assertEqual(chat_template.render([sdk.user("q")], enable_thinking=True), "text")
        self.assertEqual(asked, [("q", True, {"enable_thinking": True})])
        with self.assertRaisesRegex(Exception, "no template"):
            chat_template.render([sdk.user("q")], add_generation_prompt=False)

    def test_levels_are_those_of_the_contract(self) -> None:
        class Level(enum.Enum):
            TRACE = 0
            DEBUG = 1
            INFO = 2
            WARN = 3
            ERROR = 4

        heard: list[Level] = []
        _host.lend("log", SimpleNamespace(Level=Level, write=lambda level, message: heard.append(level)))
        for say in (log.trace, log.debug, log.info, log.warn, log.error):
            say("")
        self.assertEqual(heard, list(Level))


if __name__ == "__main__":
    unittest.main()
