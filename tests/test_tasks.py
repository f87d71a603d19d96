"""The tasks on which learning rules are compared, and the comparison itself in small."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import brainstate
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def module(name):
    """A module of tools/rules under a name of its own, out of the way of other modules."""
    spec = importlib.util.spec_from_file_location(f"rules_{name}", ROOT / "tools" / "rules" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


tasks = module("tasks")
models = module("models")
order = module("order")
earlier = module("earlier")
chart = module("chart")
replicas = module("replicas")
COPY, MATCH = tasks.Copy(8), tasks.DelayedMatch(8)


def vowels():
    pytest.importorskip("aeon")
    return tasks.JapaneseVowels(10)


@pytest.mark.parametrize("task", [COPY, MATCH], ids=lambda t: t.name)
def test_shapes_and_types_of_batches(task):
    check_shapes(task)


def test_shapes_and_types_of_recordings():
    check_shapes(vowels())


def check_shapes(task):
    many = task.train(np.random.default_rng(0), 3, task.first_level)
    assert many.inputs.shape == (3, task.steps, task.batch_size, task.inputs)
    assert many.targets.shape == (3, task.steps, task.batch_size, task.outputs)
    assert many.inputs.dtype == many.targets.dtype == np.float32
    test = task.test(np.random.default_rng(0))
    assert test.inputs.shape[0] == task.steps and test.inputs.shape[2] == task.inputs
    for targets in (many.targets, test.targets):
        assert set(np.unique(targets)) == {0.0, 1.0}
        assert targets.sum(axis=-1).max() == 1.0
    answers = many.targets.sum(axis=(1, 3))
    assert (answers == answers[0, 0]).all() and answers[0, 0] > 0


@pytest.mark.parametrize("task", [COPY, MATCH], ids=lambda t: t.name)
def test_guessing_is_at_chance(task):
    rng = np.random.default_rng(0)
    batches = [task.test(np.random.default_rng(k)) for k in range(8)]
    right = [tasks.accuracy(rng.random(b.targets.shape), b.targets) for b in batches]
    assert abs(np.mean(right) - task.chance) < 0.03
    constant = [tasks.accuracy(np.zeros_like(b.targets), b.targets) for b in batches]
    assert abs(np.mean(constant) - task.chance) < 0.03


def test_accuracy_counts_answers_that_are_asked_for():
    batch = COPY.test(np.random.default_rng(0))
    assert tasks.accuracy(batch.targets, batch.targets) == 1.0
    wrong = np.roll(batch.targets, 1, axis=-1)
    assert tasks.accuracy(wrong, batch.targets) == 0.0


@pytest.mark.parametrize("delay", [1, 5, 64])
def test_copy_asks_for_the_marked_symbol_after_the_delay(delay):
    batch = COPY.sample(np.random.default_rng(0), 64, delay)
    shown, mark, cue = np.split(batch.inputs, [COPY.symbols, COPY.symbols + 1], axis=-1)
    [marked] = np.flatnonzero(mark.all(axis=(1, 2)))
    [asked] = np.flatnonzero(batch.targets.any(axis=(1, 2)))
    assert asked == COPY.steps - 1 and asked - marked - 1 == delay
    assert mark.sum() == cue.sum() == 64 and cue[asked].all()
    assert np.array_equal(shown[marked], batch.targets[asked])
    assert (shown[:asked].sum(axis=-1) == 1.0).all() and not shown[asked].any()


def delays(inputs):
    return COPY.longest - inputs[..., COPY.symbols].argmax(axis=0)


def test_copy_curriculum_takes_delays_up_to_its_level():
    batches = COPY.train(np.random.default_rng(0), 200, 7)
    assert {int(d) for one in batches.inputs for d in delays(one)} == set(range(1, 8))


def test_copy_is_tested_at_delays_that_double():
    batch = COPY.test(np.random.default_rng(0))
    assert {d: int((delays(batch.inputs) == d).sum()) for d in COPY.delays} == dict.fromkeys(
        [1, 2, 4, 8, 16, 32, 64], COPY.repeats
    )
    level = COPY.test(np.random.default_rng(0), 3)
    assert set(delays(level.inputs)) == {3} and level.inputs.shape == batch.inputs.shape


def cues(batch):
    """Which half of the lines was more active in the first and in the second cue."""
    halves = np.stack(np.split(batch.inputs[..., :-1], 2, axis=-1)).sum(axis=-1)
    first = halves[:, : MATCH.cue].sum(axis=1)
    second = halves[:, MATCH.cue + MATCH.delay : -MATCH.answer].sum(axis=1)
    return first.argmax(axis=0), second.argmax(axis=0)


def test_match_depends_on_both_cues_and_on_neither_alone():
    batch = MATCH.test(np.random.default_rng(0))
    first, second = cues(batch)
    answer = batch.targets[-1].argmax(axis=-1)
    assert np.mean(answer == (first == second)) > 0.99
    for cue in (first, second):
        for value in (0, 1):
            assert abs(answer[cue == value].mean() - 0.5) < 0.1


def test_match_is_quiet_between_the_cues():
    batch = MATCH.test(np.random.default_rng(0))
    lines = batch.inputs[..., :-1]
    assert lines[MATCH.cue : MATCH.cue + MATCH.delay].mean() < 0.05
    assert lines[: MATCH.cue].mean() > 0.2
    assert not batch.targets[: -MATCH.answer].any()


def test_spiking_network_spikes_sparsely_on_its_task():
    net = models.SpikingNet(MATCH.inputs, 64, MATCH.outputs)
    batch = MATCH.train(np.random.default_rng(0), 1)
    brainstate.nn.init_all_states(net, batch_size=MATCH.batch_size)

    def one(x):
        net.update(x)
        return net.spikes()

    spikes = brainstate.transform.for_loop(one, jnp.asarray(batch.inputs[0]))
    assert set(np.unique(spikes)) == {0.0, 1.0}
    assert 0.02 < float(spikes.mean()) < 0.6


def test_japanese_vowels_are_those_of_the_official_split():
    task = vowels()
    train, test = task.recordings("TRAIN"), task.recordings("TEST")
    assert train.series.shape == (270, 29, 12) and test.series.shape == (370, 29, 12)
    assert np.array_equal(np.bincount(train.speakers), np.full(9, 30))
    assert sorted(np.unique(test.speakers)) == list(range(9))
    lengths = np.concatenate([train.lengths, test.lengths])
    assert (lengths.min(), lengths.max()) == (7, 29)
    assert task.chance == np.bincount(test.speakers).max() / 370


def test_an_epoch_has_every_recording_once_and_each_is_answered_after_its_end():
    task = vowels()
    batches = task.train(np.random.default_rng(0), 27)
    assert np.array_equal(batches.targets.sum(axis=(0, 1, 2)), np.full(9, 30))
    assert not batches.targets[:, :-1].any()
    assert task.steps == 29 + task.silence
    assert not batches.inputs[:, 29:].any()
    on = batches.inputs[..., -1].sum(axis=1)
    assert on.min() == 7 and on.max() <= 29


@pytest.mark.parametrize("back", [0, 3])
def test_sums_are_named_at_every_step(back):
    task = tasks.Sums(8, back=back)
    check_shapes(task)
    batch = task.train(np.random.default_rng(0), 1)
    first, second = (v.argmax(axis=-1) for v in np.split(batch.inputs[0], 2, axis=-1))
    asked = batch.targets[0].any(axis=-1)
    assert not asked[:back].any() and asked[back:].all()
    wanted = (first[: task.steps - back] + second[back:]) % task.symbols
    assert np.array_equal(batch.targets[0, back:].argmax(axis=-1), wanted)


def test_rows_of_a_page_stay_until_they_are_measured_anew():
    before = earlier.Earlier("x 4% of\n\n| rule | a |\n| --- | --- |\n| one | `p \\| q` |\n| two | 2 |\n")
    assert before.filled(("rule", "a"), [("one", ""), ("two", "3"), ("three", "")]) == [
        ("one", "`p | q`"),
        ("two", "3"),
        ("three", ""),
    ]
    assert before.filled(("rule", "b"), [("one", "")]) == [("one", "")]
    wide = earlier.Earlier("| rule | a | b |\n| --- | --- | --- |\n| one | 1 | 2 |\n")
    assert wide.filled(("rule", "a", "b"), [("one", "", "3")]) == [("one", "1", "3")]
    assert before.kept(("rule", "a"), [("two", "3"), ("four", "4")], 1) == [
        ("one", "`p | q`"),
        ("two", "3"),
        ("four", "4"),
    ]
    assert before.between("x ", " of") == "4%" and before.between("z", "") == ""
    picture = chart.chart([("A", 0.5, {"r": [0.25, 1.0]}), ("B", 0.5, {"s & t": [0.0]})], ["r", "s & t"], "c")
    first, second = chart.values_of(picture)
    assert first["r"] == pytest.approx([0.25, 1.0], abs=5e-4) and second["s & t"] == [0.0]


def test_the_order_is_checked_pair_by_pair():
    ladder = (("rtrl", "bptt"), ("d_rtrl",), ("ottt",), ("absent",), ("chance",))
    found = {
        "rtrl": [0.9],
        "bptt": [0.9, 0.8, 0.7, 0.9],
        "d_rtrl": [0.5, 0.4, 0.3, 0.4],
        "ottt": [0.4, 0.5],
        "chance": [0.6],
    }
    pairs = {(p.upper, p.lower): p for p in order.check(ladder, found)}
    assert {names: p.verdict for names, p in pairs.items()} == {
        ("bptt", "d_rtrl"): "holds",
        ("d_rtrl", "ottt"): "not separated",
    }
    assert pairs["bptt", "d_rtrl"].difference == pytest.approx(0.425)
    assert pairs["bptt", "d_rtrl"].error == pytest.approx(0.025)
    [pair] = order.check((("d_rtrl",), ("chance",)), found)
    assert pair.verdict == "reversed" and pair.difference == pytest.approx(-0.2)
    [pair] = order.check((("a",), ("b",)), {"a": [1.0, 1.0], "b": [1.0, 1.0]})
    assert pair.verdict == "not separated" and pair.error == 0.0


def test_trainings_side_by_side_are_those_one_by_one():
    start = brainstate.ShortTermState(jnp.zeros(2))
    other = brainstate.ShortTermState(jnp.ones(()))

    def double(x):
        start.value = 2.0 * start.value + other.value * x
        return start.value.sum()

    both = replicas.Replicas(double, jnp.zeros(2))
    both.start([{start: jnp.array([1.0, 2.0])}, {start: jnp.array([3.0, 4.0])}])
    x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    assert np.array_equal(both(x), [7.0, 15.0])
    assert np.array_equal(both(x), [15.0, 31.0])
    assert np.array_equal(both.values(start), [[7.0, 8.0], [12.0, 19.0]])
    assert np.array_equal(start.value, [0.0, 0.0])


def test_the_comparison_runs_and_writes_its_page(tmp_path):
    pytest.importorskip("aeon")
    page = tmp_path / "rules.md"
    command = [sys.executable, str(ROOT / "tools" / "rules"), "--quick", "--jobs", "1", "--tasks", "copy"]
    command += ["--rules", "bptt", "d_rtrl", "--out", str(tmp_path / "out"), "--page", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    assert set(found) == {"copy--bptt", "copy--d_rtrl"}
    assert found["copy--bptt"]["cosines"][0] == pytest.approx(1.0)
    assert -1.0 <= found["copy--d_rtrl"]["cosines"][0] < 1.0
    assert found["copy--d_rtrl"]["trace_bytes"] > found["copy--bptt"]["trace_bytes"] == 0
    assert all(0.0 <= f["accuracies"][0] <= 1.0 for f in found.values())
    text = page.read_text()
    assert "$" not in text and "`e = D e + f (x) x; grad = one_step + L D e_{t-1}`" in text
    assert ElementTree.parse(page.with_suffix(".svg")).getroot().tag.endswith("svg")
