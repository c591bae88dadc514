"""Continue a prompt with a BlockGen model and report the cost."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..whole_files import json_text
from .parsing import (
    MODEL_HELP,
    CommandError,
    add_cpu_weights,
    add_loading_arguments,
    integer,
    loading_options,
    model_name,
    one_or_list_of,
    read_texts,
    unescaped,
)


if TYPE_CHECKING:
    from .sampling import Generation, Sampler
    from .streamers import StreamedText


EXAMPLE = 'blockgen-hf generate "Once upon a time" --decoding arpc --block-size 16'
USAGE = "[PROMPT ...]"
_LIKELY = 5  # most likely tokens that a page shows for each position
_SETTINGS = (
    "decoding",
    "block_size",
    "denoising_steps",
    "nfe_per_block",
    "ar_seed_tokens",
    "corrector",
    "corrector_start",
    "corrector_period",
    "noise_removal",
    "sampler",
    "confidence_threshold",
    "entropy_bound",
    "acceptance",
    "draft_steps",
    "draft_decoding",
    "fused_drafts",
    "revise_block_size",
    "revise_ratio",
    "revise_steps",
    "revise_score",
    "cache_window",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
)
# Settings that only some decodings have.
_DECODINGS_OF = (
    (("revise_block_size", "revise_ratio", "revise_steps", "revise_score"), ("draft_revise",)),
    (("acceptance", "draft_steps", "fused_drafts"), ("speculative",)),
    (("draft_decoding",), ("speculative", "draft_revise")),
    (("corrector", "corrector_start", "corrector_period"), ("arpc", "speculative", "draft_revise")),
)
# Those of BlockGenGenerationConfig, known here without importing transformers.
CHOICES = {
    "decoding": ("ar", "block_diffusion", "arpc", "speculative", "draft_revise"),
    "corrector": (
        *("ar_surprisal", "ar_gap", "ar_entropy", "ar_kl", "ar_reverse_kl", "ar_tv"),
        *("entropy", "confidence", "margin", "random"),
    ),
    "noise_removal": ("ancestral", "greedy"),
    "sampler": ("ancestral", "first_hitting", "confidence", "entropy_bound"),
    "acceptance": ("match", "rejection"),
    "draft_decoding": ("block_diffusion", "arpc"),
    "revise_score": ("snapshot", "ar_surprisal", "posthoc", "random"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="texts to continue, one after the other; '-' reads one from standard input (default: no prompt)",
    )
    parser.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="text file with a prompt per line, or .jsonl with `prompt` in each line",
    )
    _add_model_arguments(parser.add_argument_group("model"))
    _add_decoding_arguments(parser.add_argument_group("decoding (default: the model's generation config)"))
    group = parser.add_argument_group("output")
    group.add_argument("--num-samples", type=integer(1), default=1, metavar="N", help="number of texts (default: 1)")
    group.add_argument(
        "--seed",
        type=integer(0, 2**32 - 1),
        metavar="N",
        help="makes the text reproducible (default: another seed every time)",
    )
    group.add_argument(
        "--show-denoising", action="store_true", help="show the intermediate drafts of the current block"
    )
    group.add_argument(
        "--compare", action="store_true", help="continue the prompt with every decoding and print a table"
    )
    group.add_argument("--json", action="store_true", help="print the result as JSON instead of text")
    _add_replay_arguments(group)


def _add_replay_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--save-html",
        type=Path,
        metavar="FILE",
        help="write a page that replays every step, also of --compare",
    )
    group.add_argument("--save-svg", type=Path, metavar="FILE", help="write an animated SVG")
    group.add_argument("--save-gif", type=Path, metavar="FILE", help="write a GIF (needs Pillow)")


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", type=model_name, help=f"{MODEL_HELP} (the default)")
    add_loading_arguments(group)
    add_cpu_weights(group)


def _add_decoding_arguments(group: argparse._ArgumentGroup) -> None:
    # Numbers are checked by BlockGenGenerationConfig, when torch and transformers have been imported.
    group.add_argument("--decoding", choices=CHOICES["decoding"], help="how the text is generated")
    group.add_argument("--block-size", type=int, metavar="N", help="number of tokens denoised together")
    group.add_argument("--denoising-steps", type=int, metavar="N", help="denoising steps per block")
    group.add_argument(
        "--nfe-per-block",
        type=int,
        metavar="N",
        help="function evaluations per block (default for arpc: two thirds of the block size)",
    )
    group.add_argument(
        "--ar-seed-tokens",
        type=int,
        metavar="N",
        help="number of tokens generated autoregressively before the first block",
    )
    group.add_argument(
        "--corrector",
        choices=CHOICES["corrector"],
        metavar="NAME",
        help="arpc: score of the proposed tokens, such as ar_surprisal or ar_kl",
    )
    group.add_argument("--corrector-start", type=int, metavar="N", help="arpc: first informed step")
    group.add_argument(
        "--corrector-period",
        type=int,
        metavar="N",
        help="arpc: every N-th step from the first informed one on is informed",
    )
    group.add_argument(
        "--noise-removal",
        choices=CHOICES["noise_removal"],
        metavar="NAME",
        help="last step of a block: ancestral or greedy",
    )
    group.add_argument(
        "--sampler", choices=CHOICES["sampler"], help="block_diffusion: how a block is denoised (default: ancestral)"
    )
    group.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="X",
        help="sampler confidence: accept tokens with at least this probability",
    )
    group.add_argument(
        "--entropy-bound",
        type=float,
        metavar="X",
        help="sampler entropy_bound: accept tokens with a total entropy of up to X nats",
    )
    group.add_argument(
        "--acceptance",
        choices=CHOICES["acceptance"],
        help="speculative: keep draft tokens that ar draws too (default), or by rejection",
    )
    group.add_argument(
        "--draft-steps", type=int, metavar="N", help="speculative: denoising steps per draft (default: 1)"
    )
    group.add_argument(
        "--draft-decoding",
        choices=CHOICES["draft_decoding"],
        help="speculative: how a draft of several steps is made; draft_revise: how drafts and revisions are denoised",
    )
    group.add_argument(
        "--fused-drafts",
        action=argparse.BooleanOptionalAction,
        help="speculative: one pass verifies and drafts (default: on a GPU)",
    )
    for option, parse, metavar, meaning in (  # a list has a number for each stage
        ("--revise-block-size", int, "N,...", "tokens revised together"),
        ("--revise-ratio", float, "X,...", "share of the text to revise"),
        ("--revise-steps", int, "N,...", "denoising steps per block"),
    ):
        group.add_argument(option, type=one_or_list_of(parse), metavar=metavar, help=f"draft_revise: {meaning}")
    group.add_argument(
        "--revise-score",
        choices=CHOICES["revise_score"],
        metavar="NAME",
        help="draft_revise: snapshot, ar_surprisal, posthoc or random: which tokens to revise",
    )
    group.add_argument(
        "--cache-window", type=int, metavar="N", help="sliding window of N tokens, for texts of any length"
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="length of the continuation (default: 64)")
    group.add_argument(
        "--stop",
        type=_stop_string,
        action="append",
        metavar="TEXT",
        help="end a text after this string, \\n for a line break; may be repeated",
    )
    group.add_argument(
        "--temperature", type=float, metavar="X", help="below 1: more predictable, above 1: more varied"
    )
    group.add_argument("--top-k", type=int, metavar="N", help="draw only from the N most likely tokens; 0: from all")
    group.add_argument(
        "--top-p", type=float, metavar="X", help="draw only from the most likely tokens with a total probability of X"
    )
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: fewer repetitions")
    group.add_argument("--greedy", action="store_true", help="take the most likely token instead of drawing one")


def _stop_string(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must be a text, but is empty")
    return unescaped(text)


def run(args: argparse.Namespace) -> int:
    _check_combinations(args)
    settings = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if args.greedy:
        settings["do_sample"] = False
    if args.stop:
        settings["stop_strings"] = args.stop
    if _replay_files(args):
        settings |= {"output_trajectory": True, "trajectory_top_k": _LIKELY if args.save_html else 0}
    prompts = _read_prompts(args)

    from .loading import one_line_errors, quiet_transformers

    if len(prompts) > 1 and _replay_files(args):
        raise CommandError(f"{_replay_files(args)[0]} replays a single text: give one prompt.")
    found = []
    with quiet_transformers(), one_line_errors():
        for number, sampler in enumerate(_make_samplers(args, prompts, settings)):
            if number > 0 and not args.json:
                print(flush=True)
            found.append(_generate(args, sampler, settings))
    if args.json:
        print(json_text(found if len(prompts) > 1 else found[0]), end="")
    return 0


def _read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt_file is not None:
        return read_texts(args.prompt_file, "--prompt-file", "prompt")
    if args.prompts.count("-") > 1:
        raise CommandError("Standard input holds one prompt: give '-' once.")
    try:
        return [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in args.prompts] or [""]
    except UnicodeDecodeError as error:
        raise CommandError(f"The prompt on standard input is not valid UTF-8 text: {error}.") from error


def _generate(args: argparse.Namespace, sampler: "Sampler", settings: dict[str, Any]) -> dict[str, Any]:
    """Continues a prompt; prints texts and costs unless they are wanted as JSON, which is returned."""
    from ..quantization import weights_format

    if args.compare:
        from .comparison import compare

        generations = compare(sampler, settings, quiet=args.json)
    else:
        generations = [sampler.generate(settings, _make_streamer(args, sampler, settings))]
        if not args.json:
            _print_generation(generations[0], sampler)
    if _replay_files(args):
        from .replaying import save_replay

        save_replay(generations, sampler.prompt, html=args.save_html, svg=args.save_svg, gif=args.save_gif)
    return {
        "model": sampler.model.name_or_path,
        "device": str(sampler.model.device),
        "dtype": weights_format(sampler.model),
        "prompt": sampler.prompt,
        "seed": sampler.seed,
        "results": [generation.to_dict() for generation in generations],
    }


def _check_combinations(args: argparse.Namespace) -> None:
    """Refuses options that would be ignored."""
    for option, others in (
        ("compare", ("decoding", "denoising_steps", "nfe_per_block", "show_denoising")),
        ("greedy", ("temperature", "top_k", "top_p")),
        ("json", ("show_denoising",)),
    ):
        for other in others:
            if getattr(args, option) and getattr(args, other) not in (None, False):
                raise CommandError(f"--{other.replace('_', '-')} has no meaning with --{option}.")
    if args.decoding == "speculative":
        for other in ("denoising_steps", "nfe_per_block", "sampler"):
            if getattr(args, other) is not None:
                raise CommandError(
                    f"--{other.replace('_', '-')} has no meaning with --decoding speculative, which has --draft-steps."
                )
    for others, decodings in _DECODINGS_OF:
        for other in others:
            if args.decoding not in (None, *decodings) and getattr(args, other) is not None:
                raise CommandError(
                    f"--{other.replace('_', '-')} has no meaning with --decoding {args.decoding}: it is for "
                    f"{' and '.join(decodings)}."
                )
    if args.show_denoising and args.num_samples > 1:
        raise CommandError("--show-denoising shows a single sample: leave --num-samples out.")
    _check_replay(args)
    if args.prompt_file is not None and args.prompts:
        raise CommandError("--prompt-file stands for the prompts: leave PROMPT out.")


def _replay_files(args: argparse.Namespace) -> list[str]:
    """The options that save a replay."""
    names = ("save_html", "save_svg", "save_gif")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def _check_replay(args: argparse.Namespace) -> None:
    files = _replay_files(args)
    if files and args.num_samples > 1:
        raise CommandError(f"{files[0]} replays a single text: leave --num-samples out.")
    pictures = [option for option in files if option != "--save-html"]
    if pictures and args.compare:
        raise CommandError(f"{pictures[0]} shows a single decoding: leave --compare out, or use --save-html.")
    for path in (args.save_html, args.save_svg, args.save_gif):  # before a text is generated in vain
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise CommandError(f"{path} cannot be written: it must be a file in a folder that exists.")
    if args.save_gif is not None and find_spec("PIL") is None:
        raise CommandError("--save-gif needs Pillow: pip install pillow.")


def _make_samplers(args: argparse.Namespace, prompts: list[str], settings: dict[str, Any]) -> "list[Sampler]":
    """One for each prompt, so that a bad one is refused before anything is generated."""
    from secrets import randbelow

    from ..generation.generation_configuration_blockgen import BlockGenGenerationConfig
    from .loading import load, pack_weights
    from .sampling import Sampler

    try:
        BlockGenGenerationConfig(**settings)  # before a large model is loaded in vain
    except ValueError as error:
        raise CommandError(error) from error
    model, tokenizer = load(args.model, **loading_options(args))
    seed = randbelow(2**32) if args.seed is None else args.seed
    samplers = [Sampler(model, tokenizer, prompt, args.num_samples, seed) for prompt in prompts]
    decoding = samplers[0].settings_in_effect(settings)["decoding"]
    is_single = decoding == "ar" and args.num_samples == 1 and not args.compare
    pack_weights(model, args.cpu_weights, is_single)
    return samplers


def _make_streamer(args: argparse.Namespace, sampler: "Sampler", settings: dict[str, Any]) -> "StreamedText | None":
    from .streamers import DraftLog, SpeculationLog, StreamedText, TerminalDrafts

    if args.json or args.num_samples > 1:
        return None
    decoding = sampler.settings_in_effect(settings)["decoding"]
    if not args.show_denoising or decoding == "ar":
        return StreamedText(sampler.tokenizer, sys.stdout)
    is_speculative = decoding == "speculative"
    if sys.stdout.isatty():
        return TerminalDrafts(sampler.tokenizer, sys.stdout, decides=not is_speculative)
    log = SpeculationLog if is_speculative else DraftLog
    return log(sampler.tokenizer, sys.stdout, sys.stderr)


def _print_generation(generation: "Generation", sampler: "Sampler") -> None:
    """The texts on standard output, and what they cost on standard error."""
    from ..quantization import weights_format
    from .sampling import describe

    if len(generation.samples) > 1:  # one sample has been streamed
        for number, sample in enumerate(generation.samples, 1):
            print(f"[{number}] {sample.text}\n")
        cost = f"{len(generation.samples)} samples: "
    else:
        cost = ""
    sys.stdout.flush()
    what = ", ".join(filter(None, (generation.settings["decoding"], describe(generation.settings))))
    drafts = ""
    if generation.num_drafted_tokens is not None:
        drafts = f", {generation.num_accepted_tokens} of {generation.num_drafted_tokens} drafted tokens accepted"
    if len(generation.samples) == 1:
        print(file=sys.stderr)
    print(
        f"{cost}{generation.num_new_tokens} new tokens, {generation.num_function_evaluations} function evaluations, "
        f"{generation.tokens_per_forward:.2f} tokens per forward, {generation.tokens_per_second:.1f} tokens/s, "
        f"{generation.seconds:.2f} s{drafts} ({what}, {weights_format(sampler.model)} weights, seed {sampler.seed})",
        file=sys.stderr,
    )
