"""What a user can set. The defaults made the committed figures."""

from dataclasses import asdict, dataclass
from typing import Any

from ..experiments import option


@dataclass(frozen=True)
class Settings:
    """Of all trainings and evaluations of a results file."""

    output_dir: str = option("runs/reproduction", "Folder for models and prepared data.")
    results: str | None = option(None, "Results file. Default: results.json in the output folder.")
    figures: str | None = option(None, "Folder for figures. Default: the output folder.")
    train_file: str | None = option(None, "Stories to train on, separated by <|endoftext|>. Default: the Hub's.")
    validation_file: str | None = option(None, "Stories to evaluate on, with --train-file.")
    seeds: int = option(3, "Trainings of each model.")

    max_documents: int = option(16_000, "Stories, and rows of sums, to train on.")
    vocab_size: int = option(512, "Tokens of the stories' tokenizer.")
    story_length: int = option(32, "Tokens of a story.")

    hidden_size: int = option(64, "Width of the models.")
    layers: int = option(2, "Layers of the models.")
    steps: int = option(400, "Training steps.")
    batch_size: int = option(16, "Rows per step.")
    learning_rate: float = option(1e-2, "Peak learning rate.")
    judge_size: int = option(96, "Width of the judge.")
    judge_steps: int = option(600, "Training steps of the judge.")

    eval_rows: int = option(128, "Validation rows.")
    eval_draws: int = option(4, "Draws of noise per validation row.")
    texts: int = option(128, "Texts per decoding.")
    variance_draws: int = option(4, "Draws of noise per row for variances.")

    def __post_init__(self) -> None:
        if (self.train_file is None) != (self.validation_file is None):
            raise ValueError("`train_file` and `validation_file` go together.")

    def that_matter(self) -> dict[str, Any]:
        """All but places and the number of seeds: what results depend on."""
        places = ("output_dir", "results", "figures", "train_file", "validation_file", "seeds")
        return {name: value for name, value in asdict(self).items() if name not in places}
