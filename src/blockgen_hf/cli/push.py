"""Push a folder to the Hub: a model with its card and code, a data set of samples, or a Space."""

import argparse
from typing import TYPE_CHECKING

from ..checkpoints import find_checkpoint


if TYPE_CHECKING:
    from ..hub.push import PushPlan


EXAMPLE = "blockgen-hf push runs/mine my-name/my-model --license apache-2.0 --dry-run"
USAGE = "DIR ORG/NAME"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="folder to upload")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="repository on the Hub; created if it does not exist")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be uploaded, including the card; makes no network requests",
    )
    group = parser.add_argument_group("repository")
    group.add_argument(
        "--repo-type",
        choices=("model", "dataset", "space"),
        default="model",
        help="kind of repository (default: model)",
    )
    group.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    group.add_argument(
        "--revision", metavar="BRANCH", help="branch to push to; created if it does not exist (default: main)"
    )
    group.add_argument("--create-pr", action="store_true", help="open a pull request")
    group.add_argument("--commit-message", metavar="TEXT", help="message of the commit")
    group = parser.add_argument_group("card (default: README.md of the folder, if there is one)")
    group.add_argument(
        "--license", metavar="ID", help="licence, such as apache-2.0 (default: from README.md or LICENSE)"
    )
    group.add_argument("--language", metavar="CODE", action="append", help="language, such as en; may be repeated")
    group.add_argument(
        "--evaluation",
        metavar="FILE",
        action="append",
        default=[],
        help="file of `evaluate --json`, or qualities of samples; may be repeated",
    )
    group.add_argument(
        "--replay",
        metavar="PROMPT",
        help="show on the card how the model continues PROMPT: an animated picture, replay.svg",
    )
    group.add_argument("--new-card", action="store_true", help="write a new card even if there is a README.md")
    group = parser.add_argument_group("files")
    group.add_argument(
        "--ignore", metavar="GLOB", action="append", default=[], help="files to leave out; may be repeated"
    )
    group.add_argument(
        "--include",
        metavar="GLOB",
        action="append",
        default=[],
        help="files to add that do not belong to a model, such as pictures of the card; may be repeated",
    )
    group.add_argument(
        "--update-code",
        action="store_true",
        help="publish this package's code if the folder has that of another version",
    )


def run(args: argparse.Namespace) -> int:
    from ..hub.push import plan_push
    from .loading import one_line_errors, quiet_transformers

    with quiet_transformers(), one_line_errors():
        folder = find_checkpoint(args.folder)
        if args.replay is not None:
            from .replaying import card_picture
        plan = plan_push(
            folder,
            args.repo_id,
            repo_type=args.repo_type,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.commit_message,
            license=args.license,
            language=args.language,
            evaluations=args.evaluation,
            replay=None if args.replay is None else card_picture(str(folder), args.replay),
            ignore=args.ignore,
            include=args.include,
            new_card=args.new_card,
            update_code=args.update_code,
        )
        _print_plan(plan)
        if args.dry_run:
            print(f"\nREADME.md:\n\n{plan.card}\nNothing was uploaded, and nobody contacted.")
            return 0
        commit = plan.upload()
    print(f"\nUploaded: {commit.pr_url or commit.commit_url}")
    return 0


def _print_plan(plan: "PushPlan") -> None:
    where = [plan.repo_type, *(["private"] if plan.private else []), f"branch {plan.revision}"]
    if plan.create_pr:
        where.append("as a pull request")
    print(f"To {plan.repo_id} ({', '.join(where)}), in one commit: {plan.commit_message}")
    width = max(len(file.path) for file in plan.files)
    for file in plan.files:
        print(f"  {file.path:<{width}}  {_size(file.size):>9}  {file.note}".rstrip())
    print(f"{len(plan.files)} files, {_size(plan.size)}")
    if plan.left_out:
        print("Left out:")
        width = max(len(path) for path, _ in plan.left_out)
        for path, reason in plan.left_out:
            print(f"  {path:<{width}}  {reason}")


def _size(number: int) -> str:
    if number < 1000:
        return f"{number} B"
    power = min(3, (len(str(number)) - 1) // 3)
    return f"{number / 1000**power:.1f} {' kMG'[power]}B"
