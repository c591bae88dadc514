"""Turns a published checkpoint into a folder that transformers loads, and back."""

import argparse

from ..checkpoints import find_checkpoint
from .figures import noise_name
from .parsing import integer, list_of


_FAMILIES = ("block-dit", "dense-dit", "ar", "bd3lm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a folder, or hf:org/repo or hf:org/repo/folder on the Hub")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in DIR; its other files stay")
    parser.add_argument("--revision", help="branch, tag or commit of a source on the Hub")
    group = parser.add_argument_group("what the published files do not say")
    group.add_argument("--diffusion-type", choices=("masked", "uniform"), help="the noise")
    group.add_argument(
        "--block-sizes", type=list_of(integer(1)), metavar="N,N,...", help="of the training, such as 1,16"
    )
    group.add_argument(
        "--block-size-weights", type=list_of(float), metavar="W,W,...", help="of the training, such as 0.05,0.95"
    )
    group.add_argument("--tokenizer", metavar="NAME", help="a folder or a tokenizer on the Hub, to be written too")
    group.add_argument("--family", choices=_FAMILIES, help="default: told by the files")
    group.add_argument(
        "--time-conditioning",
        action=argparse.BooleanOptionalAction,
        help="whether a full-sequence model knows the noise level (default: uniform ones do, masked ones do not)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--to",
        choices=("transformers", "published"),
        default="transformers",
        help="published: the way back, from a folder of this package",
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as in the source)"
    )
    group.add_argument("--max-shard-size", metavar="SIZE", help="larger weights go into several files (default: 50GB)")


def run(args: argparse.Namespace) -> int:
    from ..hub.conversion import convert_checkpoint
    from .loading import one_line_errors, quiet_transformers

    with one_line_errors(), quiet_transformers():
        report = convert_checkpoint(
            find_checkpoint(args.source),
            args.output,
            diffusion_type=args.diffusion_type,
            block_sizes=args.block_sizes,
            block_size_weights=args.block_size_weights,
            time_conditioning=args.time_conditioning,
            tokenizer=args.tokenizer and find_checkpoint(args.tokenizer),
            family=args.family,
            to=args.to,
            dtype=args.dtype,
            revision=args.revision,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
        )
    config = report.config
    sizes = ", ".join(str(size) for size in config.block_sizes)
    dtype = str(report.dtype).removeprefix("torch.")
    print(f"{report.output}: {report.family}, {noise_name(config)}, {report.num_parameters:,} parameters in {dtype}")
    print(f"block sizes {sizes}, clean attention {config.clean_attention}, {config.vocab_size:,} rows", end="")
    print(", with a tokenizer" if report.wrote_tokenizer else "")
    for note in report.notes:
        print(note)
    return 0
