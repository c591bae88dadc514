"""
What the papers say, as orderings of figures that are measured here.

BlockGen is Deschenaux & Gulcehre, which calls ARPC by its first name, AIPC; BD3-LM is Arriola et al. (2025); Diffusion
in Diffusion is the paper of `draft_revise`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .measures import LENGTHS, MIXTURE_SIZES
from .runs import Cell


STORIES, SUMS = "tinystories", "arithmetic"
MASKED, UNIFORM, FEW_AR = "mixture", "mixture, uniform noise", "mixture, 5 % AR"
ONE, FOUR, SIXTEEN, SIXTEEN_UNIFORM = "block size 1", "block size 4", "block size 16", "block size 16, uniform noise"
MIXTURE_BOUND = "log_sum_exp_upper"  # a bound with few draws too


@dataclass(frozen=True)
class Series:
    """A line of a figure and a row of a table."""

    label: str
    points: dict[str, Cell]


@dataclass(frozen=True)
class Panel:
    """
    Args:
        x, y: what the axes show.
        cost: whether x is the measured number of function evaluations per token, instead of the points' names.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    cost: bool = False


@dataclass(frozen=True)
class Ordering:
    """
    Of two figures the first is the better one, says a paper.

    Args:
        statement: what is said to be better than what.
        source: the paper's table, figure or equation.
    """

    statement: str
    source: str
    better: Cell
    worse: Cell


@dataclass(frozen=True)
class Claim:
    name: str
    title: str
    panels: Sequence[Panel]
    orderings: Sequence[Ordering]


def likelihood(task: str, variant: str, of: int | str) -> Cell:
    name = f"block_size_{of}" if isinstance(of, int) else of
    return Cell(task, variant, "likelihood", "", f"perplexity_{name}")


def sample(task: str, variant: str, decoding: str, metric: str | None = None) -> Cell:
    return Cell(task, variant, "samples", decoding, metric or QUALITY[task])


QUALITY = {STORIES: "perplexity", SUMS: "right"}
QUALITY_NAME = {STORIES: "generative perplexity", SUMS: "right equations, %"}
TASK_NAME = {STORIES: "stories", SUMS: "sums"}
HIGHER_IS_BETTER = ("right", "entropy", "distinct_2")


def ancestral(steps: int, block_size: int = 16) -> str:
    return f"block_diffusion:{steps}:block_size={block_size}"


def arpc(evaluations: int, corrector: str = "ar_surprisal") -> str:
    return f"arpc:{evaluations}:block_size=16:corrector={corrector}"


def mixture() -> Claim:
    panels, orderings = [], []
    for task in (STORIES, SUMS):
        panels.append(
            Panel(
                TASK_NAME[task],
                "block size",
                "perplexity",
                [
                    Series(label, {str(size): likelihood(task, variant, size) for size in MIXTURE_SIZES})
                    for label, variant in (("mixture, masked", MASKED), ("mixture, uniform", UNIFORM))
                ]
                + [
                    Series(
                        "one block size, masked", {str(n): likelihood(task, v, n) for n, v in _single(task).items()}
                    ),
                    Series("one block size, uniform", {"16": likelihood(task, SIXTEEN_UNIFORM, 16)}),
                    Series("mixture, masked, log-sum-exp", {"bound": likelihood(task, MASKED, MIXTURE_BOUND)}),
                    Series("mixture, uniform, log-sum-exp", {"bound": likelihood(task, UNIFORM, MIXTURE_BOUND)}),
                ],
            )
        )
        name = TASK_NAME[task]
        orderings += [
            Ordering(
                f"{name}: the masked mixture (log-sum-exp) beats block size 16 alone",
                "BlockGen, Table 1: 17.5, 21.6",
                likelihood(task, MASKED, MIXTURE_BOUND),
                likelihood(task, SIXTEEN, 16),
            ),
            Ordering(
                f"{name}: the uniform mixture (log-sum-exp) beats block size 16 alone",
                "BlockGen, Table 1: 18.5, 23.6",
                likelihood(task, UNIFORM, MIXTURE_BOUND),
                likelihood(task, SIXTEEN_UNIFORM, 16),
            ),
            Ordering(
                f"{name}: masked beats uniform noise, mixtures",
                "BlockGen, Table 1: 17.5, 18.5",
                likelihood(task, MASKED, MIXTURE_BOUND),
                likelihood(task, UNIFORM, MIXTURE_BOUND),
            ),
            Ordering(
                f"{name}: masked beats uniform noise, block size 16 alone",
                "BlockGen, Table 1: 21.6, 23.6",
                likelihood(task, SIXTEEN, 16),
                likelihood(task, SIXTEEN_UNIFORM, 16),
            ),
            Ordering(
                f"{name}: at block size 16, the model of this size beats the masked mixture",
                "BlockGen, Sec. 6.1, Table 5 and 6",
                likelihood(task, SIXTEEN, 16),
                likelihood(task, MASKED, 16),
            ),
            Ordering(
                f"{name}: at block size 1, the model of this size beats the masked mixture",
                "BlockGen, Table 5 and 6: 17.0, 19.3",
                likelihood(task, ONE, 1),
                likelihood(task, MASKED, 1),
            ),
            Ordering(
                f"{name}: block size 1 beats 16 of the masked mixture",
                "BlockGen, Table 7: 17.5, 23.7",
                likelihood(task, MASKED, 1),
                likelihood(task, MASKED, 16),
            ),
        ]
    return Claim("mixture", "The mixture against single block sizes", panels, orderings)


def _single(task: str) -> dict[int, str]:
    return {1: ONE, 4: FOUR, 16: SIXTEEN} if task == STORIES else {1: ONE, 16: SIXTEEN}


def noise_types() -> Claim:
    panels, orderings = [], []
    budgets = (2, 4, 8, 16)
    for task in (STORIES, SUMS):
        pairs = {"mixture": (UNIFORM, MASKED), "block size 16 alone": (SIXTEEN_UNIFORM, SIXTEEN)}
        panels.append(
            Panel(
                TASK_NAME[task],
                "evaluations per block of 16",
                QUALITY_NAME[task],
                [
                    Series(f"{kind}, {noise}", {str(n): sample(task, variant, ancestral(n)) for n in budgets})
                    for kind, variants in pairs.items()
                    for noise, variant in zip(("uniform", "masked"), variants, strict=True)
                ],
            )
        )
        for kind, (uniform, masked) in pairs.items():
            source = "Table 9" if kind == "mixture" else "Table 8"
            orderings += [
                Ordering(
                    f"{TASK_NAME[task]}, {kind}, {n} evaluations: uniform beats masked",
                    f"BlockGen, {source}",
                    sample(task, uniform, ancestral(n)),
                    sample(task, masked, ancestral(n)),
                )
                for n in budgets
            ]
    return Claim("noise-types", "Uniform against masked noise, ancestral sampling", panels, orderings)


def correctors() -> Claim:
    panels, orderings = [], []
    budgets = (4, 8, 16)
    for task in (STORIES, SUMS):
        for noise, variant in (("masked", MASKED), ("uniform", UNIFORM)):
            decodings = {
                "ARPC": arpc,
                "random corrector": lambda n: arpc(n, "random"),
                "ancestral": ancestral,
            }
            for metric, label in ((QUALITY[task], QUALITY_NAME[task]), ("entropy", "unigram entropy, nats")):
                if metric == "entropy" and task == SUMS:
                    continue  # the digits of right sums are what they are
                panels.append(
                    Panel(
                        f"{TASK_NAME[task]}, {noise}",
                        "evaluations per block of 16",
                        label,
                        [
                            Series(name, {str(n): sample(task, variant, of(n), metric) for n in budgets})
                            for name, of in decodings.items()
                        ]
                        + [Series("AR", {"AR": sample(task, variant, "ar", metric)})],
                    )
                )
            table = "Table 13 to 15" if noise == "masked" else "Table 10 to 12"
            for n in budgets:
                where = f"{TASK_NAME[task]}, {noise}, {n} evaluations"
                orderings += [
                    Ordering(
                        f"{where}: ARPC beats a random corrector",
                        f"BlockGen, {table}",
                        sample(task, variant, arpc(n)),
                        sample(task, variant, arpc(n, "random")),
                    ),
                    Ordering(
                        f"{where}: ARPC beats ancestral sampling",
                        "BlockGen, Fig. 3",
                        sample(task, variant, arpc(n)),
                        sample(task, variant, ancestral(n)),
                    ),
                ]
    return Claim("correctors", "ARPC against random correctors", panels, orderings)


def ar_share() -> Claim:
    panels, orderings = [], []
    for task in (STORIES, SUMS):
        shares = {"equal weights, 20 % AR": MASKED, "5 % AR, 95 % block size 16": FEW_AR}
        panels += [
            Panel(
                TASK_NAME[task],
                "block size",
                "perplexity",
                [
                    Series(label, {str(size): likelihood(task, variant, size) for size in MIXTURE_SIZES})
                    for label, variant in shares.items()
                ]
                + [Series("block size 16 alone", {"16": likelihood(task, SIXTEEN, 16)})],
            ),
            Panel(
                f"{TASK_NAME[task]}, ARPC",
                "evaluations per block of 16",
                QUALITY_NAME[task],
                [
                    Series(label, {str(n): sample(task, variant, arpc(n)) for n in (4, 8, 16)})
                    for label, variant in shares.items()
                ],
            ),
        ]
        name = TASK_NAME[task]
        orderings += [
            Ordering(
                f"{name}: 20 % AR beats 5 % AR (log-sum-exp)",
                "BlockGen, later revision: 17.5, 19.1",
                likelihood(task, MASKED, MIXTURE_BOUND),
                likelihood(task, FEW_AR, MIXTURE_BOUND),
            ),
            Ordering(
                f"{name}: 5 % AR (log-sum-exp) beats block size 16 alone",
                "BlockGen, later revision: 19.1, 21.6",
                likelihood(task, FEW_AR, MIXTURE_BOUND),
                likelihood(task, SIXTEEN, 16),
            ),
            Ordering(
                f"{name}: at block size 16, 5 % AR beats 20 % AR",
                "BlockGen, Table 6: more weight, better",
                likelihood(task, FEW_AR, 16),
                likelihood(task, MASKED, 16),
            ),
        ]
    return Claim("ar-share", "An AR share of 5 %", panels, orderings)


def revision() -> Claim:
    panels, orderings = [], []
    for task in (STORIES, SUMS):
        draft = {n: sample(task, "mix-scale", ancestral(n, 4)) for n in (1, 2, 3, 4)}
        scores = ("snapshot", "random")
        revised = {
            (score, n, steps): sample(task, "mix-scale", _revise(n, steps, score))
            for score in scores
            for n, steps in ((1, 8), (2, 8), (2, 16))
        }
        panels.append(
            Panel(
                TASK_NAME[task],
                "evaluations per token",
                QUALITY_NAME[task],
                [
                    Series("draft, blocks of 4", {f"{n} per block": cell for n, cell in draft.items()}),
                    *(
                        Series(
                            f"draft, then revise ({score})",
                            {
                                f"{n} per block + {m}": revised[chosen, n, m]
                                for chosen, n, m in revised
                                if chosen == score
                            },
                        )
                        for score in scores
                    ),
                ],
                cost=True,
            )
        )
        paper = "Diffusion in Diffusion"
        for n, steps, more in ((1, 8, 2), (2, 8, 3), (2, 16, 4)):
            own, where = revised["snapshot", n, steps], f"{TASK_NAME[task]}, {n} per block + {steps}"
            orderings += [
                Ordering(f"{where}: revised beats the draft", f"{paper}: 21.9, 27.4", own, draft[n]),
                Ordering(
                    f"{where}: revised beats a draft with {more} per block", f"{paper}, equal cost", own, draft[more]
                ),
                Ordering(f"{where}: snapshot beats random", f"{paper}, remasking", own, revised["random", n, steps]),
            ]
    return Claim("revision", "Draft then revise against its draft", panels, orderings)


def _revise(steps: int, revise_steps: int, score: str) -> str:
    """A quarter of a draft of blocks of 4 is revised in one block as long as the text."""
    settings = f"denoising_steps={steps}:revise_ratio=0.25:revise_steps={revise_steps}:revise_score={score}"
    return f"draft_revise:block_size=4:revise_block_size={{length}}:{settings}"


INTERVALS = {"whole": "0.001 1", "0.3 to 0.8": "0.3 0.8", "0.45 to 0.95": "0.45 0.95", "0.5 to 1": "0.5 1"}


def clipping() -> Claim:
    models = {"block size 4": FOUR, "block size 16": SIXTEEN}

    def variance(variant: str, interval: str, metric: str) -> Cell:
        return Cell(STORIES, variant, "noise", INTERVALS[interval], metric)

    panels = [
        Panel(
            f"variance of the {metric}",
            "noise levels",
            "variance",
            [
                Series(label, {interval: variance(variant, interval, metric) for interval in INTERVALS})
                for label, variant in models.items()
            ],
        )
        for metric in ("loss", "gradient")
    ]
    recipes = {
        "cross entropy": SIXTEEN,
        "ELBO, clipped": "BD3-LM, clipped",
        "ELBO, whole interval": "BD3-LM, whole interval",
    }
    panels.append(
        Panel(
            "after training, block size 16",
            "trained with",
            "perplexity",
            [Series("perplexity", {label: likelihood(STORIES, variant, 16) for label, variant in recipes.items()})],
        )
    )
    orderings = [
        Ordering(
            f"{label}, {metric}: noise levels {interval} beat the whole interval",
            "BD3-LM, clipped noise schedules",
            variance(variant, interval, metric),
            variance(variant, "whole", metric),
        )
        for label, variant in models.items()
        for interval in list(INTERVALS)[1:]
        for metric in ("loss", "gradient")
    ]
    orderings += [
        Ordering(
            f"perplexity: {better} beats the ELBO on the whole interval",
            source,
            likelihood(STORIES, recipes[better], 16),
            likelihood(STORIES, recipes["ELBO, whole interval"], 16),
        )
        for better, source in (
            ("ELBO, clipped", "BlockGen, Table 5: 22.8, 23.7"),
            ("cross entropy", "BlockGen, Table 5: 22.8, 23.7"),
        )
    ]
    return Claim("clipping", "Clipped against unclipped noise levels", panels, orderings)


def stratification() -> Claim:
    ways = ("stratified", "independent", "shared")
    panels = [
        Panel(
            f"{TASK_NAME[task]}, {metric}",
            "block sizes of a step",
            "variance",
            [
                Series(
                    f"variance of the {metric}", {way: Cell(task, MASKED, "block sizes", way, metric) for way in ways}
                )
            ],
        )
        for task in (STORIES, SUMS)
        for metric in ("loss", "gradient")
    ]
    panels.append(
        Panel(
            "after training, stories",
            "block size",
            "perplexity",
            [
                Series(label, {str(size): likelihood(STORIES, variant, size) for size in MIXTURE_SIZES})
                for label, variant in (("stratified", MASKED), ("one size per step", "mixture, one size per step"))
            ],
        )
    )
    orderings = [
        Ordering(
            f"{TASK_NAME[task]}, {metric}: stratified beats {way}",
            "BlockGen, Sec. 3.2, Algorithm 2",
            Cell(task, MASKED, "block sizes", "stratified", metric),
            Cell(task, MASKED, "block sizes", way, metric),
        )
        for task in (STORIES, SUMS)
        for metric in ("loss", "gradient")
        for way in ways[1:]
    ]
    orderings += [
        Ordering(
            f"stories, perplexity at block size {size}: stratified beats one size per step",
            "BlockGen, Table 6: 0.7 and 0.89",
            likelihood(STORIES, MASKED, size),
            likelihood(STORIES, "mixture, one size per step", size),
        )
        for size in (1, 16)
    ]
    return Claim("stratification", "Stratified against independent block sizes", panels, orderings)


_WINDOW = 15  # with a block of 16, no more than the trained length, 31 tokens of sums and 32 of stories


def length() -> Claim:
    def perplexity(task: str, size: int, window: int, part: int) -> Cell:
        return Cell(task, MASKED, "lengths", f"{size} {window}", f"perplexity_{part}")

    panels, orderings = [], []
    for task in (STORIES, SUMS):
        panels.append(
            Panel(
                TASK_NAME[task],
                "positions up to so many trained lengths",
                "perplexity",
                [
                    Series(
                        f"block size {size}, {f'window of {window}' if window else 'no window'}",
                        {str(part): perplexity(task, size, window, part) for part in LENGTHS},
                    )
                    for size in (1, 16)
                    for window in (_WINDOW, 0)
                ],
            )
        )
        last = LENGTHS[-1]
        for size in (1, 16):
            name, windowed = f"{TASK_NAME[task]}, block size {size}", perplexity(task, size, _WINDOW, last)
            orderings += [
                Ordering(
                    f"{name}: 4 to 8 trained lengths on, a window beats none",
                    "BD3-LM, texts of any length",
                    windowed,
                    perplexity(task, size, 0, last),
                ),
                Ordering(
                    f"{name}: with a window, the tokens there are no harder than the first ones",
                    "BD3-LM, texts of any length",
                    windowed,
                    perplexity(task, size, _WINDOW, 1),
                ),
            ]
    return Claim("length", "Perplexity against length", panels, orderings)


CLAIMS = {
    claim.name: claim
    for claim in (
        mixture(),
        noise_types(),
        correctors(),
        ar_share(),
        revision(),
        clipping(),
        stratification(),
        length(),
    )
}
