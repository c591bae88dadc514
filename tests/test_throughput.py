"""The benchmark of generation: what it counts and times, its models, and the plain baseline of benchmarks/."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from enumeration import chi_square_p_value
from test_generate_law import NUM_SAMPLES, SIGNIFICANCE, VOCAB_SIZE, law_model, oracle_of
from tiny import EOS, MASK, PAD, generate, tiny_model, words
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from blockgen_hf import BlockGenForDiffusionLM
from blockgen_hf.evaluation import throughput
from blockgen_hf.evaluation.throughput import (
    Case,
    Contender,
    Generated,
    Machine,
    Measurement,
    NetworkMeter,
    NetworkUse,
    Run,
    measure,
    random_prompts,
    table,
    weight_bytes,
)
from blockgen_hf.evaluation.throughput_contenders import (
    Decoding,
    blockgen_contenders,
    compiled_contenders,
    denoiser_entropy,
    expected_passes,
    gpt2_contender,
    gpt2_like,
    random_model,
)
from blockgen_hf.modeling.diffusion_blockgen import NoiseSchedule
from blockgen_hf.modeling.layers_blockgen import BlockGenModulation


CPU = torch.device("cpu")


@pytest.fixture
def machine() -> Machine:
    return Machine(CPU, torch.float32, size=32, megabytes=1)


@pytest.fixture(scope="module")
def plain() -> Iterator[Any]:
    """benchmarks/plain_generation.py"""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    import plain_generation

    yield plain_generation
    sys.path.remove(folder)


def one_run(contender: Contender, case: Case, machine: Machine) -> Run:
    return measure(case, [contender], machine, repeats=1)[0].runs[0]


def decoding(text: str, block_size: int = 4) -> Decoding:
    return Decoding.parse(text, block_size)


# the meter


def test_flops_are_those_of_the_matrix_products() -> None:
    model = tiny_model("without_adaln", attn_implementation="eager")
    cache = DynamicCache(config=model.config)
    with FlopCounterMode(display=False) as counter, NetworkMeter(model) as use, torch.no_grad():
        model(words(3, 6), words(3, 0), cache=cache, use_cache=True)
        model(noisy_input_ids=words(3, 4), block_size=4, cache=cache)
        model(words(3, 4), words(3, 4), block_size=1, cache=cache)
        model(words(3, 2), cache=cache, use_cache=True, query_input_ids=words(3, 1))
    assert use.flops == counter.get_total_flops()


def test_the_meter_leaves_a_compiled_network_compiled() -> None:
    """A count that changes inside of what is compiled would have every pass compiled anew."""
    model = tiny_model()
    compiled = CompileCounter()
    model.base_model.forward = torch.compile(model.base_model.forward, backend=compiled)
    with NetworkMeter(model) as use, torch.no_grad():
        for seed in range(4):
            model(noisy_input_ids=words(2, 4, seed=seed), block_size=4)
    assert use.forwards == 4 and compiled.frame_count == 1


def test_flops_of_gpt2() -> None:
    model = gpt2_like(tiny_model())
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, NetworkMeter(model) as use:
        model.generate(words(2, 5), max_new_tokens=4)
    assert use.forwards == 4 and use.flops == counter.get_total_flops()


def test_bytes_are_weights_and_cache() -> None:
    model = tiny_model()
    config = model.config
    cache = DynamicCache(config=config)
    trunk = weight_bytes(model.model)
    head = 4 * (config.hidden_size + 1) * config.vocab_size
    embedding = 4 * config.vocab_size * config.hidden_size
    assert trunk + head + embedding == sum(weight.nbytes for weight in model.parameters())
    with NetworkMeter(model) as use, torch.no_grad():
        model(words(3, 6), words(3, 0), cache=cache, use_cache=True)
        assert use.bytes_read == trunk  # nothing is cached yet, and nothing goes through the head
        model(noisy_input_ids=words(3, 4), block_size=4, cache=cache)
    keys_and_values = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert use.bytes_read == 2 * trunk + head + keys_and_values


def test_calls_are_counted_and_nested_ones_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 1 whenever it is read."""
    readings = iter(range(100))
    monkeypatch.setattr(throughput, "read_clocks", lambda device: (float(next(readings)), 0.0))
    model = tiny_model()
    with NetworkMeter(model) as use, torch.no_grad():
        model(words(2, 5), words(2, 4), noisy_position_ids=torch.arange(5, 9)[None], block_size=4)
        model(words(2, 5), words(2, 0))
        model.lm_head(torch.zeros(3, 16))  # on its own
    assert (use.forwards, use.predicting_forwards) == (2, 1)
    assert (use.tokens, use.head_tokens) == (2 * 9 + 2 * 5, 2 * 4 + 3)
    assert use.seconds == 3.0 and next(readings) == 6
    model(words(2, 5))
    assert use.forwards == 2  # the meter is off


def test_what_generate_runs_is_what_is_counted(machine: Machine) -> None:
    """Every token of the prompt goes through the layers once, and every new one of `ar` but the last, with queries."""
    [contender] = blockgen_contenders(tiny_model(), [decoding("ar")])
    run = one_run(contender, Case("masked", 6, 2, 5), machine)
    assert run.generated == Generated(2 * 5, 5.0)
    assert (run.network.forwards, run.network.predicting_forwards, run.network.head_tokens) == (5, 5, 2 * 5)
    assert run.network.tokens == 2 * (6 + 4 + 5)
    assert 0 < run.network.seconds < run.seconds and 0 < run.network.cpu_seconds < run.cpu_seconds


def test_gpt2_is_of_the_same_size(machine: Machine) -> None:
    model = tiny_model(intermediate_size=48)
    gpt2 = gpt2_like(model)
    assert throughput.layer_weights(gpt2.config) == throughput.layer_weights(model.config)
    run = one_run(gpt2_contender(gpt2), Case("masked", 0, 3, 5), machine)
    assert run.generated == Generated(3 * 5, 5.0)  # behind a first token
    assert (run.network.forwards, run.network.tokens, run.network.head_tokens) == (5, 3 * 5, 3 * 5)


# the rounds


def test_contenders_take_turns_on_the_same_prompts(machine: Machine) -> None:
    calls: list[tuple[str, int, list[list[int]], float]] = []
    model = tiny_model()

    def contender(name: str) -> Contender:
        def generate(prompts: torch.Tensor, new_tokens: int) -> Generated:
            calls.append((name, new_tokens, prompts.tolist(), torch.rand(()).item()))
            return Generated(new_tokens, 1.0)

        return Contender(name, "ar", model, generate)

    case = Case("masked", 7, 2, 20)
    told: list[str] = []
    found = measure(case, [contender("a"), contender("b")], machine, 2, warm_up_tokens=16, progress=told.append)
    assert [name for name, *_ in calls] == ["a", "b"] * 3 and len(told) == 6
    assert [tokens for _, tokens, *_ in calls] == [16, 16, 20, 20, 20, 20]
    rounds = [(prompts, number) for _, _, prompts, number in calls]
    assert rounds[2] == rounds[3] and rounds[4] == rounds[5] and rounds[2] != rounds[4]
    assert [len(measurement.runs) for measurement in found] == [2, 2]


def test_prompts_have_no_special_tokens() -> None:
    config = tiny_model(eos_token_id=EOS, bos_token_id=3).config
    prompts = random_prompts(config, Case("masked", 400, 2, 1), seed=0)
    assert prompts.shape == (2, 400)
    assert set(range(23)) - set(prompts.flatten().tolist()) == {3, PAD, EOS, MASK}


# figures


def measurement(machine: Machine, name: str, text: str, *runs: Run, passes: float | None = None) -> Measurement:
    model = tiny_model()

    def generate(prompts: torch.Tensor, new_tokens: int) -> Generated:
        raise NotImplementedError

    contender = Contender(name, text, model, generate, None if passes is None else lambda case: passes)
    return Measurement(contender, Case("masked", 0, 1, 64), machine, 0.5, [*runs])


def run_of(cpu_seconds: float, network: float = 0.0, seconds: float | None = None, **use: Any) -> Run:
    seconds = cpu_seconds if seconds is None else seconds
    return Run(seconds, cpu_seconds, Generated(64, 16.0), NetworkUse(network, network, **use))


def test_figures_are_medians_by_cpu_seconds(machine: Machine) -> None:
    machine._product_rates, machine._read_rates = [1e9, 4e9, 100e9], [1e9, 2e9, 3e9]
    use = {"forwards": 10, "predicting_forwards": 9, "tokens": 80, "flops": 8 * 10**9, "bytes_read": 10**9}
    runs = [run_of(4, 3, 8, **use), run_of(2, 1, 4, **use), run_of(64, 1, 64, **use)]
    figures = measurement(machine, "a", "ar", *runs).figures()
    assert (figures["tokens_per_second"], figures["tokens_per_second_min"]) == (8, 1)
    assert figures["tokens_per_second_max"] == 16 and figures["tokens_per_working_second"] == 16
    assert figures["share_outside_network"] == 0.5 and figures["milliseconds_per_forward"] == 100
    assert figures["fraction_of_matrix_products"] == 0.5 and figures["fraction_of_bandwidth"] == 0.125


def test_table_compares_with_plain_and_gpt2(machine: Machine) -> None:
    machine._product_rates, machine._read_rates = [1e9], [1e9]
    use = {"forwards": 10, "predicting_forwards": 9, "tokens": 80}
    found = [
        measurement(machine, "blockgen", "arpc:8", run_of(2, **use)),
        measurement(machine, "blockgen", "block_diffusion:4", run_of(1, **use), passes=3.25),
        measurement(machine, "plain", "arpc:8", run_of(8, **use)),
        measurement(machine, "gpt2", "ar", run_of(1, **use)),
    ]
    cells = [dict(zip(table(found).columns, row, strict=True)) for row in table(found).rows]
    assert [row["of plain"] for row in cells] == ["4.00 x", "", "1.00 x", ""]
    assert [row["of GPT-2"] for row in cells] == ["0.50 x", "1.00 x", "0.12 x", "1.00 x"]
    assert [row["expected"] for row in cells] == ["", "3.2", "", ""]
    assert {row["forwards"] for row in cells} == {"9 + 1"} and {row["tokens a forward"] for row in cells} == {"8.0"}


def test_the_speed_of_the_machine() -> None:
    machine = Machine(CPU, torch.bfloat16, size=64, megabytes=2)
    machine.measure()
    machine.measure()
    facts = machine.to_dict()
    assert facts["measurements"] == 2 and facts["dtype"] == "bfloat16"
    assert facts["gflops_per_second"] > 0 and facts["gigabytes_per_second"] > 0
    assert machine.pick(3.0, 2.0) == 2.0


@pytest.mark.parametrize(("tick", "rows"), [(1.0, 256), (0.2, 512), (0.01, 1024)])
def test_a_slow_processor_multiplies_smaller_matrices(monkeypatch: pytest.MonkeyPatch, tick: float, rows: int) -> None:
    """A clock by which a product of 256 rows takes `tick` seconds, and one of 512 eight times that."""
    now, real = 0.0, torch.randn
    scale = 1.0

    def randn(*shape: int, **settings: Any) -> torch.Tensor:
        nonlocal scale
        scale = (shape[0] / 256) ** 3
        return real(*shape, **settings)

    def read_clocks(device: torch.device) -> tuple[float, float]:
        nonlocal now
        now += tick * scale
        return now, now

    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(throughput, "read_clocks", read_clocks)
    machine = Machine(CPU, torch.float32, size=1024, megabytes=1)
    machine.measure()
    assert machine.to_dict()["rows_of_matrices"] == rows
    assert machine.flops_per_second == pytest.approx(2 * 256**3 / tick)


# models and decodings


@pytest.mark.parametrize("diffusion_type", ["masked", "uniform"])
def test_random_models_do_the_work_of_trained_ones(diffusion_type: str) -> None:
    model = random_model("tiny", diffusion_type)
    assert denoiser_entropy(model) == pytest.approx(4.0, abs=0.7)
    modulations = [module for module in model.modules() if isinstance(module, BlockGenModulation)]
    assert len(modulations) == 3
    assert all(parameter.std() > 0.1 for module in modulations for parameter in module.parameters())


def test_expected_passes_of_a_linear_schedule() -> None:
    for steps, tokens in ((4, 16), (16, 16), (64, 16), (64, 3)):
        passes = steps * (1 - (1 - 1 / steps) ** tokens)
        assert expected_passes(NoiseSchedule("linear", 1e-3), steps, tokens) == pytest.approx(passes, rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_expected_passes_are_the_steps_that_change_something(schedule: str) -> None:
    model = tiny_model(noise_schedule=schedule)
    outputs = generate(
        model,
        torch.zeros(2000, 0, dtype=torch.long),
        decoding="block_diffusion",
        block_size=4,
        denoising_steps=6,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_trajectory=True,
    )
    [states] = outputs.trajectory
    changes = torch.stack([(z_s != z_t).any(-1) for z_t, z_s in pairwise(states)]).sum(0).double()
    [contender] = blockgen_contenders(model, [decoding("block_diffusion:6")])
    assert contender.expected_passes is not None
    expected = contender.expected_passes(Case("masked", 0, 1, 4))
    assert abs(changes.mean() - expected) < 4 * changes.std() / len(changes) ** 0.5
    whole_and_rest = contender.expected_passes(Case("masked", 0, 1, 9))
    assert whole_and_rest == pytest.approx(2 * expected + 1.0, rel=1e-6)  # one token changes at one step


def test_words_of_python_are_read() -> None:
    settings = decoding("ar:do_sample=False:top_k=None:num_beams=1").settings
    assert settings == {"decoding": "ar", "do_sample": False, "top_k": None, "num_beams": 1}


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param(lambda function, **options: function, id="stand-in"),
        pytest.param(partial(torch.compile, backend="eager"), id="dynamo", marks=pytest.mark.slow),
    ],
)
def test_compiled_contenders_write_the_same_and_warm_up_with_the_whole_length(
    compiler: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", compiler)
    model, texts = tiny_model(), [decoding("block_diffusion:4"), decoding("arpc:3")]
    contenders = [*blockgen_contenders(model, texts), *compiled_contenders(model, texts)]
    assert [contender.name for contender in contenders] == 2 * ["blockgen"] + 2 * ["blockgen-compiled"]
    case, lengths = Case("masked", 3, 2, 12), []
    for contender in contenders[2:]:
        plain_generate = contender.generate

        def generate(prompts: torch.Tensor, new_tokens: int, plain: Any = plain_generate) -> Generated:
            lengths.append(new_tokens)
            return plain(prompts, new_tokens)

        [found] = measure(case, [replace(contender, generate=generate)], machine, 1, warm_up_tokens=4)
        [run] = found.runs
        assert run.network.forwards > 0 and run.generated.num_new_tokens == 24
    assert lengths == 4 * [12]
    prompts = torch.randint(MASK, (2, 3))
    settings = dict(max_new_tokens=12, do_sample=True, eos_token_id=None, decoding="arpc", block_size=4)
    outputs = []
    for contender in (contenders[1], contenders[3]):
        torch.manual_seed(0)
        outputs.append(contender.model.generate(prompts, **settings))
    assert torch.equal(*outputs)


def test_expected_passes_are_of_masked_ancestral_sampling_alone() -> None:
    texts = ("ar", "arpc:8", "block_diffusion:8:noise_removal=greedy", "block_diffusion:8:ar_seed_tokens=2")
    contenders = blockgen_contenders(tiny_model(), [decoding(text) for text in texts])
    assert [contender.expected_passes is not None for contender in contenders] == [False, False, True, False]
    [contender] = blockgen_contenders(tiny_model("uniform"), [decoding("block_diffusion:8")])
    assert contender.expected_passes is None


def test_names_of_decodings() -> None:
    assert decoding("ar").settings == {"decoding": "ar"}
    settings = decoding("block_diffusion:64:noise_removal=greedy:temperature=0.5", 16).settings
    assert settings == {
        "decoding": "block_diffusion",
        "block_size": 16,
        "denoising_steps": 64,
        "noise_removal": "greedy",
        "temperature": 0.5,
    }
    settings = decoding("speculative:acceptance=rejection:fused_drafts=true").settings
    assert settings["acceptance"] == "rejection" and settings["fused_drafts"] is True
    assert decoding("speculative:draft_steps=2").in_effect(tiny_model()).draft_steps == 2
    for budget, steps in ((8, 6), (16, 12)):  # the whole budget is spent
        config = decoding(f"arpc:{budget}").in_effect(tiny_model())
        assert config.num_denoising_steps() == steps and config.function_evaluations(steps) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diffusion", "`decoding` must be"),
        ("ar:4", "`ar:4` is no decoding: behind `ar` there may be settings"),
        ("speculative:4", "behind `speculative` there may be settings (`name=value`)."),
        ("speculative:draft_steps=2:acceptance=rejection", "needs drafts of one step"),
        ("block_diffusion:x", "and a positive number"),
        ("block_diffusion:0", "and a positive number"),
        ("arpc:8:temprature=1", "settings that `generate` does not know: ['temprature']"),
        ("arpc:8:denoising_steps=4", "contradict"),
    ],
)
def test_bad_names_of_decodings(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        decoding(text)


def test_a_budget_that_is_too_small_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="`nfe_per_block=2` is too small"):
        blockgen_contenders(tiny_model(), [decoding("arpc:2")])


# the plain baseline


def plain_decoder(plain: Any, model: PreTrainedModel, text: str, block_size: int) -> Any:
    return plain.PlainDecoder(model, decoding(text, block_size).in_effect(model))


@pytest.mark.parametrize("process", ["masked", "uniform"])
@pytest.mark.parametrize("text", ["ar", "block_diffusion:3", "arpc:5:corrector_period=1"])
def test_the_plain_baseline_has_the_exact_law(plain: Any, process: Any, text: str) -> None:
    """Four tokens in blocks of three and one."""
    model = law_model(process)
    oracle, length = oracle_of(model), 3
    laws: dict[str, np.ndarray] = {
        "ar": oracle.ar_law(length),
        "block_diffusion:3": oracle.block_diffusion_law(length, 2, 3),
        "arpc:5:corrector_period=1": oracle.arpc_law(length, 2, 3),
    }
    decoder = plain_decoder(plain, model, text, 2)
    decoder.generate(torch.zeros(NUM_SAMPLES, 0, dtype=torch.long), length)
    assert decoder.tokens.max() < VOCAB_SIZE
    assert chi_square_p_value(decoder.tokens.numpy(), laws[text]) > SIGNIFICANCE


def test_the_plain_baseline_runs_every_pass(plain: Any, machine: Machine) -> None:
    """Two blocks of four and one of two behind a prompt: T passes each, commits of the prompt and of two blocks."""
    model = tiny_model()
    texts = ("ar", "block_diffusion:6", "arpc:8", "block_diffusion:4:noise_removal=greedy")
    contenders = plain.plain_contenders(model, [decoding(text) for text in texts])
    assert [contender.decoding for contender in contenders] == list(texts[:3])
    case = Case("masked", 5, 2, 10)
    ar, block_diffusion, arpc = (one_run(contender, case, machine) for contender in contenders)
    assert (ar.network.forwards, ar.generated) == (10, Generated(20, 10.0))
    assert (block_diffusion.network.predicting_forwards, block_diffusion.network.forwards) == (18, 21)
    assert block_diffusion.generated == Generated(20, 18.0)
    assert block_diffusion.network.head_tokens == 2 * 6 * 10  # logits everywhere, always
    assert (arpc.network.predicting_forwards, arpc.generated.num_function_evaluations) == (24, 24.0)


def test_the_plain_baseline_continues_the_prompt(plain: Any) -> None:
    """As `generate` in its likeliest path: temperature near zero by a head that is sure."""
    model: BlockGenForDiffusionLM = tiny_model(scale=1.5)
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    prompts = words(2, 5)
    for text, settings in (("ar", {"decoding": "ar"}), ("block_diffusion:1", {"decoding": "block_diffusion"})):
        decoder = plain_decoder(plain, model, text, 4)
        decoder.generate(prompts, 10)
        steps = {} if text == "ar" else {"block_size": 4, "denoising_steps": 1}
        assert torch.equal(decoder.tokens, generate(model, prompts, max_new_tokens=10, **settings, **steps))
