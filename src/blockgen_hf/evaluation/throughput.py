"""
How fast models generate: tokens per second, the forward passes that are run for them, and how much of the machine
they use.

The contenders of a case take turns (A B C A B C ...), with the machine's own speed measured in every round, so that a
change of that speed meets all of them. Figures are medians over the rounds. On a CPU shares and fractions are of CPU
seconds, which other jobs on the machine disturb less than the clock on the wall; on other devices of the clock.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers.cache_utils import Cache

from ..modeling.releases_blockgen import take_cache
from ..quantization import PackedLinear
from ..tables import Table


@dataclass(frozen=True)
class Case:
    """What the contenders are asked for: `batch_size` texts of `new_tokens` behind prompts of `prefix` tokens."""

    diffusion_type: str
    prefix: int
    batch_size: int
    new_tokens: int


@dataclass(frozen=True)
class Generated:
    """What a call gave: new tokens of all rows together, function evaluations of the average row."""

    num_new_tokens: int
    num_function_evaluations: float


@dataclass(frozen=True)
class Contender:
    """
    A way to generate.

    Args:
        name (`str`): who generates.
        decoding (`str`): how; equal for contenders that are compared.
        model (`PreTrainedModel`): whose passes are counted; its `base_model` and output embeddings are the network.
        generate (`Callable`): continues prompts `[B, prefix]` by so many tokens.
        expected_passes (`Callable`, *optional*): denoiser passes that a row needs, on average.
        is_compiled (`bool`): whether shapes that it has not met cost compilation.
    """

    name: str
    decoding: str
    model: PreTrainedModel
    generate: Callable[[torch.Tensor, int], Generated]
    expected_passes: Callable[[Case], float] | None = None
    is_compiled: bool = False


@dataclass
class NetworkUse:
    """
    What a network did: seconds in it, passes (those among them that predict, and do not only fill the cache), tokens
    that went through its layers and through its head, and the arithmetic and memory traffic that follow from these.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    forwards: int = 0
    predicting_forwards: int = 0
    tokens: int = 0
    head_tokens: int = 0
    flops: int = 0
    bytes_read: int = 0


class NetworkMeter:
    """
    Counts and times what a model does within a `with` block, by hooks on the model, its trunk and its head: time in
    any of them is time in the network, everything else is outside.

    FLOPs are those of the matrix products: two a weight of the layers and token, two a weight of the head and token
    that it sees, and attention with every token seeing the cache and the tokens of the call. Bytes are those that a
    pass cannot do without: weights and cache, each once; of embeddings only rows are read, which do not count.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.use = NetworkUse()
        self._model = model
        self._trunk: nn.Module = model.base_model
        self._head: nn.Module = model.get_output_embeddings()
        self._device = model.device
        self._trunk_bytes = weight_bytes(self._trunk)
        self._head_bytes = weight_bytes(self._head)
        self._depth = 0
        self._call = (0, 0, 0)  # rows, tokens and cached tokens of the call
        self._handles: list[Any] = []

    def __enter__(self) -> NetworkUse:
        self._handles = [
            self._trunk.register_forward_pre_hook(self._count_trunk, with_kwargs=True),
            self._head.register_forward_pre_hook(self._count_head),
        ]
        # Of the trunk, not of a layer: a hook inside of what is compiled would have it compiled anew in every pass.
        self._handles.append(self._trunk.register_forward_hook(self._count_kept))
        for module in (self._model, self._trunk, self._head):
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave))
        return self.use

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if self._depth == 0:
            self._started = read_clocks(self._device)
        self._depth += 1

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            seconds, cpu_seconds = read_clocks(self._device)
            self.use.seconds += seconds - self._started[0]
            self.use.cpu_seconds += cpu_seconds - self._started[1]

    def _count_trunk(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = (*args, kwargs.get("input_ids"), kwargs.get("noisy_input_ids"))
        clean_or_noisy = [ids for ids in given if isinstance(ids, torch.Tensor)]
        rows = clean_or_noisy[0].shape[0]
        length = sum(ids.shape[1] for ids in clean_or_noisy)
        cached = _cached_tokens(take_cache({**kwargs}))
        self._call = (rows, length, cached)
        config: PreTrainedConfig = self._model.config
        width, layers = config.hidden_size, config.num_hidden_layers
        self.use.forwards += 1
        self.use.predicting_forwards += int(clean_or_noisy[-1].shape[1] > 0)
        self.use.tokens += rows * length
        self.use.flops += 2 * rows * length * layer_weights(config) + 4 * layers * width * rows * length * (
            cached + length
        )
        self.use.bytes_read += self._trunk_bytes + 2 * layers * width * rows * cached * self._model.dtype.itemsize

    def _count_kept(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Of tokens that the trunk does not return, the last layer computes keys and values alone, but for one."""
        rows, length, cached = self._call
        config: PreTrainedConfig = self._model.config
        width = config.hidden_size
        weights = layer_weights(config) // config.num_hidden_layers - 2 * width * width
        left_out = rows * (length - max(output[0].shape[1], 1))
        self.use.flops -= 2 * left_out * weights + 4 * left_out * width * (cached + length)

    def _count_head(self, module: nn.Module, args: tuple) -> None:
        tokens = args[0].shape[:-1].numel()
        if tokens:
            self.use.head_tokens += tokens
            self.use.flops += 2 * tokens * self._model.config.hidden_size * self._model.config.vocab_size
            self.use.bytes_read += self._head_bytes


def layer_weights(config: PreTrainedConfig) -> int:
    """Entries of the matrices that a token meets in the layers: attention and MLP, as in BlockGen and GPT-2."""
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    return int(config.num_hidden_layers * (4 * width * width + 2 * width * inner))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of its parameters but embeddings, and of packed weights."""
    parts = [part for part in module.modules() if not isinstance(part, nn.Embedding)]
    packed = sum(part.nbytes for part in parts if isinstance(part, PackedLinear))
    return packed + sum(weight.nbytes for part in parts for weight in part.parameters(recurse=False))


def _cached_tokens(cache: Cache | None) -> int:
    """Tokens whose keys are read: a static cache is read as a whole."""
    if cache is None:
        return 0
    return int(cache.get_max_length() if cache.is_compileable else cache.get_seq_length())


def read_clocks(device: torch.device) -> tuple[float, float]:
    """Seconds on the wall and of the CPU, when the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """A list that holds seconds on the wall and of the CPU after the block."""
    seconds: list[float] = []
    started = read_clocks(device)
    yield seconds
    seconds += [now - before for now, before in zip(read_clocks(device), started, strict=True)]


SECONDS_OF_A_PRODUCT = 2.0


class Machine:
    """
    How fast the machine multiplies matrices and reads memory.

    Args:
        device (`torch.device`): where.
        dtype (`torch.dtype`): of the matrices; memory is read as float32.
        size (`int`): rows of the square matrices; fewer where a product would take more than about two seconds, as in
            bf16 on a processor without it.
        megabytes (`int`): memory that is read at a time; more than the caches hold.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int = 2048, megabytes: int = 256) -> None:
        self.device = device
        self.dtype = dtype
        self._matrix = self._square(size)
        self._memory = torch.ones(megabytes * 1_000_000 // 4, device=device)
        self._product_rates: list[float] = []
        self._read_rates: list[float] = []
        self._work()  # the first call of a kernel is a slow one

    def _square(self, size: int) -> torch.Tensor:
        """
        Normal numbers in `size` rows, reached by doubling: twice the rows are eight times the work. GPUs multiply ones
        or zeros faster, since they heat up less.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        rows = min(size, 256)
        while True:
            matrix = torch.randn(rows, rows, generator=generator, device=self.device).to(self.dtype)
            matrix @ matrix  # the first call of a kernel is a slow one
            with timed(self.device) as seconds:
                matrix @ matrix
            if rows == size or 8 * seconds[0] > SECONDS_OF_A_PRODUCT:
                return matrix
            rows = min(2 * rows, size)

    def _work(self) -> tuple[float, float]:
        with timed(self.device) as product:
            self._matrix @ self._matrix
        with timed(self.device) as read:
            self._memory.sum()
        return self.pick(*product), self.pick(*read)

    def measure(self) -> None:
        """Another measurement of both."""
        product_seconds, read_seconds = self._work()
        self._product_rates.append(2 * len(self._matrix) ** 3 / product_seconds)
        self._read_rates.append(self._memory.nbytes / read_seconds)

    def pick(self, seconds: float, cpu_seconds: float) -> float:
        """The seconds that shares and fractions are of."""
        return cpu_seconds if self.device.type == "cpu" else seconds

    @property
    def flops_per_second(self) -> float:
        return statistics.median(self._product_rates)

    @property
    def bytes_per_second(self) -> float:
        return statistics.median(self._read_rates)

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": str(self.device),
            "name": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "gflops_per_second": self.flops_per_second / 1e9,
            "gigabytes_per_second": self.bytes_per_second / 1e9,
            "rows_of_matrices": len(self._matrix),
            "measurements": len(self._product_rates),
        }


@dataclass(frozen=True)
class Run:
    """One call of a contender."""

    seconds: float
    cpu_seconds: float
    generated: Generated
    network: NetworkUse


@dataclass
class Measurement:
    """The runs of a contender in a case. Properties are medians over the runs."""

    contender: Contender
    case: Case
    machine: Machine
    warm_up_seconds: float
    runs: list[Run] = field(default_factory=list)

    def _median(self, figure: Callable[[Run], float]) -> float:
        return float(statistics.median(map(figure, self.runs)))

    def _working(self, run: Run) -> float:
        return self.machine.pick(run.seconds, run.cpu_seconds)

    def _in_network(self, run: Run) -> float:
        return self.machine.pick(run.network.seconds, run.network.cpu_seconds)

    def figures(self) -> dict[str, float]:
        """Medians by name; rates are those of new tokens, the rest is told in docs/speed.md."""
        rates = [run.generated.num_new_tokens / run.seconds for run in self.runs]
        return {
            "tokens_per_second": statistics.median(rates),
            "tokens_per_second_min": min(rates),
            "tokens_per_second_max": max(rates),
            "tokens_per_working_second": self._median(lambda run: run.generated.num_new_tokens / self._working(run)),
            "num_function_evaluations": self._median(lambda run: run.generated.num_function_evaluations),
            "forwards": self._median(lambda run: run.network.forwards),
            "predicting_forwards": self._median(lambda run: run.network.predicting_forwards),
            "tokens_through_layers": self._median(lambda run: run.network.tokens),
            "tokens_through_head": self._median(lambda run: run.network.head_tokens),
            "milliseconds_per_forward": self._median(
                lambda run: 1000 * self._in_network(run) / max(1, run.network.forwards)
            ),
            "share_outside_network": self._median(lambda run: 1 - self._in_network(run) / self._working(run)),
            "fraction_of_matrix_products": self._median(lambda run: run.network.flops / self._working(run))
            / self.machine.flops_per_second,
            "fraction_of_bandwidth": self._median(lambda run: run.network.bytes_read / self._working(run))
            / self.machine.bytes_per_second,
        }

    @property
    def expected_passes(self) -> float | None:
        passes = self.contender.expected_passes
        return None if passes is None else passes(self.case)

    def to_dict(self) -> dict[str, Any]:
        return {
            "contender": self.contender.name,
            "decoding": self.contender.decoding,
            **self.figures(),
            "expected_passes": self.expected_passes,
            "warm_up_seconds": self.warm_up_seconds,
            "runs": [asdict(run) for run in self.runs],
        }


def measure(
    case: Case,
    contenders: list[Contender],
    machine: Machine,
    repeats: int,
    warm_up_tokens: int = 16,
    progress: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """
    Lets the contenders generate in turns.

    Args:
        case ([`Case`]): what they generate.
        contenders (`list` of [`Contender`]): who. All get the same prompts, of random tokens, and the same seeds.
        machine ([`Machine`]): measured once a round.
        repeats (`int`): rounds.
        warm_up_tokens (`int`): new tokens of a call before the rounds, timed on its own: what is allocated or compiled
            once must not count as generation. A compiled contender warms up with the whole length, so that it has met
            every shape.
        progress (`Callable`, *optional*): told before every call what comes.

    Returns:
        a [`Measurement`] for each contender.
    """
    measurements = []
    for contender in contenders:
        if progress is not None:
            progress(f"warm-up: {contender.name}, {contender.decoding}")
        num_tokens = case.new_tokens if contender.is_compiled else min(warm_up_tokens, case.new_tokens)
        warm_up = _run(contender, case, num_tokens, seed=repeats)
        measurements.append(Measurement(contender, case, machine, warm_up.seconds))
    for seed in range(repeats):
        machine.measure()
        for measurement in measurements:
            if progress is not None:
                who = measurement.contender
                progress(f"round {seed + 1} of {repeats}: {who.name}, {who.decoding}")
            measurement.runs.append(_run(measurement.contender, case, case.new_tokens, seed))
    return measurements


def _run(contender: Contender, case: Case, new_tokens: int, seed: int) -> Run:
    prompts = random_prompts(contender.model.config, case, seed).to(contender.model.device)
    set_seed(seed)
    with NetworkMeter(contender.model) as network, timed(contender.model.device) as seconds:
        generated = contender.generate(prompts, new_tokens)
    return Run(seconds[0], seconds[1], generated, network)


def random_prompts(config: PreTrainedConfig, case: Case, seed: int) -> torch.Tensor:
    """`[batch_size, prefix]`: random ids, none of them special to the model."""
    special = {config.eos_token_id, config.pad_token_id, config.bos_token_id, getattr(config, "mask_token_id", None)}
    words = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    return words[torch.randint(len(words), (case.batch_size, case.prefix), generator=generator)]


def table(measurements: list[Measurement], plain: str = "plain", gpt2: str = "gpt2") -> Table:
    """
    A row a measurement. `plain` and `gpt2` name the contenders whose speed the others' is
    divided by: the plain one with the same decoding.
    """
    rates = {
        (found.contender.name, found.contender.decoding): found.figures()["tokens_per_working_second"]
        for found in measurements
    }
    gpt2_rate = next((rate for (name, _), rate in rates.items() if name == gpt2), None)
    working = "CPU s" if measurements[0].machine.device.type == "cpu" else "s"
    columns = (
        "decoding", "by", "tokens/s (min to max)", f"tokens/{working}", "of plain", "of GPT-2", "evaluations",
        "expected", "forwards", "tokens a forward", "ms a forward", "outside", "matmul", "memory",
    )  # fmt: skip
    rows = []
    for found in measurements:
        figures, expected = found.figures(), found.expected_passes
        rate = figures["tokens_per_working_second"]
        plain_rate = rates.get((plain, found.contender.decoding))
        filling = figures["forwards"] - figures["predicting_forwards"]
        cells = (
            found.contender.decoding,
            found.contender.name,
            "{tokens_per_second:.2f} ({tokens_per_second_min:.2f} to {tokens_per_second_max:.2f})".format(**figures),
            f"{rate:.2f}",
            "" if plain_rate is None else f"{rate / plain_rate:.2f} x",
            "" if gpt2_rate is None else f"{rate / gpt2_rate:.2f} x",
            f"{figures['num_function_evaluations']:.1f}",
            "" if expected is None else f"{expected:.1f}",
            f"{figures['predicting_forwards']:.0f} + {filling:.0f}",
            f"{figures['tokens_through_layers'] / max(1, figures['forwards']):.1f}",
            f"{figures['milliseconds_per_forward']:.1f}",
            f"{figures['share_outside_network']:.1%}",
            f"{figures['fraction_of_matrix_products']:.1%}",
            f"{figures['fraction_of_bandwidth']:.1%}",
        )
        rows.append(cells)
    return Table(columns, rows, num_labels=2)


__all__ = [
    "Case",
    "Contender",
    "Generated",
    "Machine",
    "Measurement",
    "NetworkMeter",
    "NetworkUse",
    "Run",
    "layer_weights",
    "measure",
    "random_prompts",
    "table",
    "weight_bytes",
]
