"""The chat: history as the template renders it, switches, commands, and the text that a stopped answer leaves."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from qwen3f.data.chat import kinds
from qwen3f.data.chat.template import render
from qwen3f.data.tokenizers.tokenizer import load_tokenizer
from qwen3f.infer.chat import Chat, said
from qwen3f.infer.text_generator import Answer, TextGenerator
from qwen3f.infer.text_request import TextOptions, make_request
from qwen3f.interop import hf

OPTIONS = TextOptions(thinking=True, max_new_tokens=12, seed=4)


def talk(generator, lines, options=OPTIONS, interrupted=lambda: False):
    """(the chat, the text that it has printed) after these lines were entered."""
    out = io.StringIO()
    chat = Chat(generator, options, out, interrupted)
    for line in lines:
        assert chat.enter(line)
    return chat, out.getvalue()


@pytest.fixture(scope="module")
def generator(source):
    return TextGenerator(*source[1:])


def user(content):
    return {"role": "user", "content": content}


def test_each_turn_is_the_answer_to_the_whole_history(generator):
    """Compared with the generator, asked with the history. Sampled tokens are the same too, since turn n draws from the
    random stream n. An empty line asks nothing."""
    options = OPTIONS.changed(system="Be brief.")
    chat, printed = talk(generator, ["What is é7?", "  ", "And é8?\n"], options)
    questions = [user("What is é7?"), user("And é8?")]
    assert chat.messages[::2] == questions
    expected, history = "", []
    for turn, question in enumerate(questions):
        asked = make_request(generator.cfg, generator.tokenizer, [*history, question], options, stream=turn)
        for (answer,) in generator.answer([asked]):
            answer.read()
        expected += answer.text + "\n"
        history += [question, {"role": "assistant", "content": answer.text}]
    assert printed == expected


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_writes_does_nothing_to_a_terminal(generator, monkeypatch, terminal):
    monkeypatch.setattr(Answer, "read", lambda self: "\x1b[2J\ta\n" if self.finish_reason else "")

    class Out(io.StringIO):
        def isatty(self):
            return terminal

    out = Out()
    Chat(generator, OPTIONS, out, lambda: False).enter("q")
    assert out.getvalue() == ("\\x1b[2J\ta\n\n" if terminal else "\x1b[2J\ta\n\n")


@pytest.mark.parametrize(
    "text, content, thought",
    [
        ("<think>\nhm\n</think>\n\nyes", "yes", "hm"),
        ("yes", "yes", ""),
        ("<think>\nhalf a thou", "", "half a thou"),
        ("", "", ""),
        ("<think>\nhm\n</think>", "", "hm"),
    ],
)
def test_thoughts_are_no_part_of_the_history(text, content, thought):
    """A thought that was cut off is left out too."""
    message = said(text)
    assert (message["content"], message["reasoning_content"]) == (content, thought)
    later = render([user("a"), message, user("b")], add_generation_prompt=True)
    assert later == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        f"{content}<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("kind", [kinds.THINKING, kinds.INSTRUCT])
def test_history_and_switches_of_kinds_that_do_not_ask(source, capsys, kind):
    """If the template's prompt ends with `<think>`, the answer begins inside the thought. If the model never thinks,
    all of its text is the answer. Neither kind of template has switches."""
    directory, cfg, p, _ = source
    generator = TextGenerator(cfg, p, load_tokenizer(directory, kind.name))
    chat, _ = talk(generator, ["/no_think", "a", "b"], OPTIONS.changed(thinking=None))
    assert [message["content"] for message in chat.messages[::2]] == ["a", "b"]
    assert "has no switches" in capsys.readouterr().err
    for text, content, thought in (("hm\n</think>\n\nyes", "yes", "hm"), ("half a thou", "", "half a thou")):
        message = said(text, kind)
        if kind.always:
            assert (message["content"], message["reasoning_content"]) == (content, thought)
        else:
            assert message == {"role": "assistant", "content": text}


def test_the_cache_has_the_beginning_of_the_next_turn(source, monkeypatch):
    """A turn prefills only what the cache lacks: the last answer, now without its thoughts, and the new question."""
    generator, counts = TextGenerator(*source[1:]), []
    launch = generator._engine._device.launch

    def counting(plan, before):
        counts.append(sum(chunk.count for chunk in plan.chunks))
        return launch(plan, before)

    monkeypatch.setattr(generator._engine._device, "launch", counting)
    questions = ["The answer to question 12 is é12; think about it, then say 13.", "Why?", "Then say 14."]
    lengths, prefilled = [], []
    chat = Chat(generator, OPTIONS, io.StringIO(), lambda: False)
    for question in questions:
        chat.enter(question)
        asked = make_request(generator.cfg, generator.tokenizer, chat.messages[:-1], OPTIONS)
        lengths.append(len(asked.prompt))
        prefilled.append(sum(counts))
        counts.clear()
    assert prefilled[0] == lengths[0] - 1  # the decoding pass takes the prompt's last token
    for before, now, computed in zip(lengths, lengths[1:], prefilled[1:]):
        assert computed <= now - before
    assert lengths[0] > 20


def test_switches_go_with_a_question(generator, capsys):
    chat, _ = talk(generator, ["/no_think", "a", "b /think", "/reset", "c"])
    assert chat.messages[0] == user("c")
    chat, printed = talk(generator, ["/no_think", "a", "/think", "b /no_think"])
    assert [message["content"] for message in chat.messages[::2]] == ["a /no_think", "b /no_think"]
    expected = generator.generate("a /no_think", thinking=True, max_new_tokens=12, seed=4)
    assert printed.startswith(expected + "\n")
    assert "(/no_think will be added to your next question)" in capsys.readouterr().err
    chat, _ = talk(generator, ["/think", "a"], OPTIONS.changed(thinking=False))
    assert chat.messages[0] == user("a")
    assert "switches have no effect" in capsys.readouterr().err


def test_a_stopped_answer_keeps_what_was_said(generator):
    """The answer is stopped after five passes. Its text stays in the history, and the next question follows it."""
    whole = generator.generate("a", thinking=True, max_new_tokens=100, seed=4)
    left = [5]

    def interrupted():
        left[0] -= 1
        return not left[0]

    chat, printed = talk(generator, ["a", "b"], OPTIONS.changed(max_new_tokens=100), interrupted)
    begun = chat.messages[1]["content"]
    assert begun
    assert whole.startswith(begun)
    assert len(begun) < len(whole)
    assert printed.startswith(begun + "\n")
    assert chat.messages[2] == user("b")
    assert chat.messages[3]["content"]
    assert not generator._engine.step()


def test_a_chat_that_fills_the_context_says_so_and_goes_on_after_reset(generator, capsys):
    """Before that, max_new_tokens is reduced to the room that is left."""
    options = OPTIONS.changed(max_new_tokens=10_000)
    chat, _ = talk(generator, ["a", "word " * 60], options)
    assert len(chat.messages) == 2
    error = capsys.readouterr().err
    assert "and the model takes 256 with the answer; shorten it, or write /reset" in error
    chat.enter("/reset")
    assert chat.enter("b")
    assert chat.messages[0] == user("b")
    assert chat.enter("a\ud800")
    assert "lone surrogate" in capsys.readouterr().err
    assert not chat.enter("/quit")


# -- the program in a process of its own -------------------------------------------------------------------------------


@pytest.fixture
def start(source, tmp_path):
    """A function that starts launch.py with experiments/generate.py in a process of its own."""
    root, running = os.getcwd(), []

    def start(*flags, init_from=source[0], **options):
        command = [
            sys.executable, f"{root}/launch.py", "--config", f"{root}/experiments/generate.py",
            f"--config.init_from={init_from}", "--config.device=cpu", *flags,
        ]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        running.append(subprocess.Popen(command, cwd=tmp_path, env=env, **{**pipes, **options}))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_a_chat_over_a_pipe(start, generator, tmp_path):
    process = start("--config.max_new_tokens=12", "--config.seed=4")
    lines = "What is é7?\n/no_think\nAnd é8?\n".encode() + b"\xff\n/reset\nWhat is \xc3\xa97?"  # no last newline
    out, err = process.communicate(lines, timeout=200)
    assert process.returncode == 0, err
    _, expected = talk(generator, ["What is é7?", "/no_think", "And é8?", "/reset", "What is é7?"])
    assert out.decode() == expected
    notes = err.decode()
    assert "(error: the line is not UTF-8, so it was left out)" in notes
    assert "(the history is empty now)" in notes
    assert "Traceback" not in notes
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_the_answer_and_not_the_chat(start, source, tmp_path):
    """At a terminal. The answer is so long that the model does not end it by itself while the test runs."""
    _, cfg, p, tokenizer = source
    hf.save_pretrained(tmp_path / "long", cfg.replace(max_position_embeddings=200_000), p, tokenizer)
    ours, theirs = pty.openpty()
    flags = ("--config.max_new_tokens=100000", "--config.temperature=0.0", "--config.presence_penalty=0.0")
    process = start(*flags, init_from=str(tmp_path / "long"), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""

    def read():
        nonlocal seen
        assert process.poll() is None, seen
        if select.select([ours], [], [], 2)[0]:
            seen += os.read(ours, 65536)

    def drain():
        nonlocal seen
        while select.select([ours], [], [], 1)[0]:
            seen += os.read(ours, 65536)

    def wait_for(words):
        nonlocal seen
        end = time.monotonic() + 100
        while words not in seen:
            assert time.monotonic() < end, seen
            read()
        seen = seen.partition(words)[2]

    wait_for(b"> ")
    for _ in range(2):
        os.write(ours, b"T\n")
        wait_for(b"T\r\n")  # the terminal's echo
        while len(seen) < 5:  # bytes of the answer
            read()
        process.send_signal(signal.SIGINT)
        wait_for(b"(stopped)")
        wait_for(b"> ")
    # Now while no answer is being computed. If a signal arrives before readline waits, readline handles it only at the
    # next line. So the test repeats both the signal and /quit until they have had their effect.
    seen = b""
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        drain()
        if seen.endswith(b"> "):
            break
    assert process.poll() is None, seen
    with contextlib.suppress(OSError):  # a terminal raises this once the other side has closed
        for _ in range(20):
            os.write(ours, b"/quit\n")
            drain()
    assert process.wait(timeout=60) == 0
    os.close(ours)


def test_ctrl_c_while_a_file_is_answered_leaves_what_can_go_on(start, tmp_path):
    rows, out = 3000, tmp_path / "out.jsonl"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"é{i}"}) + "\n" for i in range(rows)))
    flags = (
        "--config.input=in.jsonl",
        "--config.out=out.jsonl",
        "--config.max_new_tokens=100",
        "--config.batch_size=2",
    )
    process = start(*flags)
    end = time.monotonic() + 200
    while not out.exists() or not out.stat().st_size:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped; the same command resumes" in err.decode()
    assert "Traceback" not in err.decode()
    assert 0 < out.read_bytes().count(b"\n") < rows
