"""The chat template in a model's directory decides its prompts in generation and training, and later stages keep it."""

import json
import shutil
from pathlib import Path

import pytest

from qwen3f import cli
from qwen3f.data.chat import kinds
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.run import run as generate
from qwen3f.infer.text_generator import TextGenerator
from qwen3f.interop import source
from qwen3f.preference import sampling as answers
from qwen3f.rl.judge import Judge
from qwen3f.stages import dpo, dpo_online, grpo, sft
from qwen3f.train.setup import make_setup
from qwen3f.train.workdir import keep_tokenizer
from tests.data.chat.conversations import answer, user
from tests.data.chat.references import REFERENCES
from tests.data.sources.adapters.real_rows import write
from tests.stages import toy_chats, toy_pairs, toy_rl

TEMPLATE = "chat_template.jinja"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("templates")
    toy_chats.write_weights(place / "weights", toy_chats.SMALL)
    write([{"messages": [user(f"q{n}"), answer("a" * (n % 7 + 1))]} for n in range(40)], place / "plain" / "x.jsonl")
    thoughts = [{"messages": [user(f"q{n}"), {**answer("a"), "reasoning": "t" * (n % 7 + 1)}]} for n in range(40)]
    write(thoughts, place / "thoughts" / "x.jsonl")
    return place


def directory(root, place, template):
    shutil.copytree(root / "weights", place)
    (place / TEMPLATE).write_text(template)
    return place


def train(root, init_from, workdir, data="plain", **changes):
    config = toy_chats.make_config(root)
    config.data.mixture = f"chats@{root / data}"
    config.update(init_from=str(init_from), steps=1, show_samples=1, **changes)
    cli.run_stage(config, workdir, False)


def ask(capsys, init_from, **changes):
    """The prompt that the stage generate gives to the model, as text."""
    config = cli.load_experiment("experiments/generate.py")
    config.update(init_from=str(init_from), prompt="q", max_new_tokens=1, device="cpu", **changes)
    seen, take = [], TextGenerator.answer

    def answering(self, requests):
        requests = list(requests)
        seen.extend(asked.prompt for asked in requests)
        return take(self, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextGenerator, "answer", answering)
        generate(config, init_from)
    capsys.readouterr()
    return load_tokenizer(source.tokenizer_path(str(init_from))).decode(seen[0])


ASKED = {
    "hybrid": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
    "instruct-2507": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
    "thinking-2507": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "coder": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
}
SHOWN = {  # what is shown of a sample (without a thought, with one); the trained part begins at ⟦
    "hybrid": ("assistant\n<think>\n\n</think>\n\n⟦a", "assistant\n⟦<think>\nt"),
    "instruct-2507": ("assistant\n⟦a", None),
    "thinking-2507": ("assistant\n<think>\n\n</think>\n\n⟦a", "assistant\n<think>\n⟦t"),
    "coder": ("assistant\n⟦a", None),
}


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_model_is_asked_and_trained_as_its_directory_says(root, tmp_path, capsys, kind):
    ours = Path(kinds.__file__).with_name("jinja") / f"{kind}.jinja"
    place = directory(root, tmp_path / "hf", REFERENCES.get(kind) or ours.read_text())
    assert ask(capsys, place) == ASKED[kind]
    for data, words in zip(("plain", "thoughts"), SHOWN[kind]):
        capsys.readouterr()
        if words is None:
            with pytest.raises(UserError, match=rf"x.jsonl:\d+: Message 1 has a thought, .* kind {kind}, has no place"):
                train(root, place, tmp_path / data, data)
            continue
        train(root, place, tmp_path / data, data)
        assert words in capsys.readouterr().out
        assert (tmp_path / data / "tokenizer" / TEMPLATE).read_text() == (place / TEMPLATE).read_text()
        assert ask(capsys, tmp_path / data) == ASKED[kind]


PREFERRED = {  # what is shown of a chosen answer (without a thought, with one); the part that counts begins at ⟦
    "instruct-2507": ("assistant\n⟦a", None),
    "thinking-2507": ("assistant\n<think>\n\n</think>\n\n⟦a", "assistant\n<think>\n⟦t"),
}


@pytest.mark.parametrize("stage", ["dpo", "reward_model"])
@pytest.mark.parametrize("kind", PREFERRED)
def test_preferences_are_learnt_in_the_model_s_kind_of_chats(root, tmp_path, capsys, kind, stage):
    place = directory(root, tmp_path / "hf", REFERENCES[kind])
    for thought, words in zip((None, "t"), PREFERRED[kind]):
        asked = [[user(f"q{n}")] for n in range(40)]
        rows = [{"chosen": [*q, answer("aaa", thought)], "rejected": [*q, answer("b", thought)]} for q in asked]
        write(rows, tmp_path / f"{thought}" / "x.jsonl")
        config = toy_pairs.make_config(tmp_path, stage, steps=1, show_samples=2)
        config.init_from, config.data.mixture = str(place), f"pairs@{tmp_path / f'{thought}'}"
        workdir = tmp_path / f"w{thought}"
        if words is None:
            with pytest.raises(UserError, match=f"has a thought, .* kind {kind}, has no place for one"):
                cli.run_stage(config, workdir, False)
            continue
        cli.run_stage(config, workdir, False)
        shown = capsys.readouterr().out
        assert (words in shown) if stage == "dpo" else (words.replace("⟦", "") in shown.replace("⟦", ""))
        experiment = "generate.py" if stage == "dpo" else "grpo.py"
        assert f"--config experiments/{experiment}" in shown.partition("what next:")[2]
        assert kind_of(load_tokenizer(workdir / "tokenizer")).name == kind


@pytest.mark.parametrize("stage", ["dpo_online", "grpo"])
def test_what_a_model_answers_in_training_has_the_thought_that_its_prompt_opens(root, tmp_path, stage):
    def configure(template):
        place = directory(root, tmp_path / template, REFERENCES[template])
        if stage == "grpo":
            changes = {"steps": 1, "eval.questions": 1, "data.kinds": "arithmetic", "init_from": str(place)}
            return toy_rl.make_config(tmp_path, **changes)
        config = toy_pairs.online_config(tmp_path, steps=1, init_from=str(place))
        config.online.thinking = True
        return config

    flag = {"dpo_online": "online", "grpo": "rollout"}[stage]
    with pytest.raises(UserError, match=f"instruct-2507, which never thinks: write --config.{flag}.thinking=False, or"):
        cli.run_stage(configure("instruct-2507"), tmp_path / "w", False)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        judge, written = Judge.__call__, answers.Sampler._written

        def judging(self, samples):
            seen.extend(sample.text for sample in samples)
            return judge(self, samples)

        def writing(self, *arguments):
            seen.append(written(self, *arguments).text)
            return written(self, *arguments)

        patch.setattr(Judge, "__call__", judging)
        patch.setattr(answers.Sampler, "_written", writing)
        cli.run_stage(configure("thinking-2507"), tmp_path / "w", False)
    assert seen
    assert all(text.startswith("<think>\n") for text in seen)


def test_an_unknown_template_is_refused_until_one_is_chosen_which_then_stays(root, tmp_path, capsys):
    place = directory(root, tmp_path / "hf", "{% for message in messages %}[INST]{{ message.content }}{% endfor %}")
    with pytest.raises(
        UserError, match=r"template in .*hf/chat_template.jinja is of no kind .*--config.chat_template=KIND"
    ):
        train(root, place, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    with pytest.raises(UserError, match="--config.chat_template=KIND"):
        ask(capsys, place)
    assert ask(capsys, place, chat_template="thinking-2507") == ASKED["thinking-2507"]
    with pytest.raises(UserError, match="config.chat_template='chatml' is unknown; use one of hybrid"):
        train(root, place, tmp_path / "w", chat_template="chatml")
    train(root, place, tmp_path / "w", chat_template="instruct-2507")
    assert SHOWN["instruct-2507"][0] in capsys.readouterr().out
    train(root, place, tmp_path / "w")  # resumes with the template that the workdir keeps
    with pytest.raises(UserError, match="--config.chat_template=coder is not the chat template .* is instruct-2507"):
        train(root, place, tmp_path / "w", chat_template="coder")
    train(root, tmp_path / "w", tmp_path / "w2")
    assert SHOWN["instruct-2507"][0] in capsys.readouterr().out
    config = cli.load_experiment("experiments/export_hf.py")
    config.update(init_from=str(tmp_path / "w2"), out=str(tmp_path / "out"))
    cli.run_stage(config, tmp_path / "unused", False)
    assert kind_of(load_tokenizer(tmp_path / "out")).name == "instruct-2507"


def test_a_template_beside_our_own_kind_of_tokenizer_goes_along(tmp_path):
    """A SentencePiece tokenizer saves only its model, so the template must be saved as well."""
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(40)]
    train_sentencepiece(texts, 330, tmp_path / "hf" / "tokenizer.model")
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"chat_template": REFERENCES["instruct-2507"]}))
    keep_tokenizer(tmp_path / "w", load_tokenizer(tmp_path / "hf"))
    assert kind_of(load_tokenizer(tmp_path / "w" / "tokenizer")).name == "instruct-2507"


@pytest.mark.parametrize("check, make_config, changes, words", [
    (sft.check, toy_chats.make_config, {"eval.modes": "plain,thinking"}, "leave enable_thinking=True out"),
    (grpo.check, toy_rl.make_config, {"rollout.thinking": True}, "write --config.rollout.thinking=False"),
    (dpo.check, toy_pairs.make_config, {"eval.thinking": True}, "write --config.eval.thinking=False"),
    (dpo_online.check, toy_pairs.online_config, {"online.thinking": True}, "write --config.online.thinking=False"),
])  # fmt: skip
def test_modes_that_the_chosen_template_has_not_are_refused_before_a_start(check, make_config, changes, words, root):
    config = make_config(root, chat_template="instruct-2507", **{"eval.questions": 1}, **changes)
    config.init_from = str(root / "weights")
    with pytest.raises(UserError, match=f"instruct-2507, which never thinks: {words}"):
        check(make_setup(config))


def test_modes_that_the_template_has_not(root, tmp_path):
    place = directory(root, tmp_path / "hf", REFERENCES["instruct-2507"])
    config = toy_chats.make_config(root)
    config.data.update(mixture=f"chats@{root / 'plain'}", kinds="arithmetic")
    config.init_from = str(place)
    config.eval.update(questions=1, modes="plain,thinking")
    with pytest.raises(UserError, match="instruct-2507, which never thinks: leave enable_thinking=True out"):
        cli.run_stage(config, tmp_path / "w", False)
    config.eval.questions = 0
    config.data.switches = 0.5
    with pytest.raises(UserError, match="instruct-2507, has no switches: write --config.data.switches=0"):
        cli.run_stage(config, tmp_path / "w", False)
    config = cli.load_experiment("experiments/rejection_sample.py")
    config.update(init_from=str(place), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="instruct-2507, which never thinks"):
        cli.run_stage(config, tmp_path / "unused", False)
