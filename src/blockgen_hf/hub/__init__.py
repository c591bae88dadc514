"""
The Hub: checkpoints published in other layouts, cards, and pushing.

A published checkpoint becomes a folder (conversion.py):

    sources.py    the folder that is read, or a download       weights.py     its tensors
    families.py   which family it is, its configuration        layouts.py     the families' names and shapes
    conversion_tokenizer.py, conversion_output.py              conversion_back.py    the way back

and a folder goes to the Hub (push.py):

    folders.py    which files, checked                         licenses.py    under which licence
    cards.py      README.md, from card_facts.py, card_training.py and card_evaluation.py by hub_cards/
    spaces.py     a Space to push

files.py has the names of files that both know.
"""

from .cards import model_card, samples_card, write_samples
from .conversion import ConversionReport, convert_checkpoint
from .push import PushPlan, plan_push, push_folder
from .spaces import write_space


__all__ = [
    "ConversionReport",
    "PushPlan",
    "convert_checkpoint",
    "model_card",
    "plan_push",
    "push_folder",
    "samples_card",
    "write_samples",
    "write_space",
]
