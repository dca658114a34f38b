"""braindecode's ``EEGClassifier`` with Engram's windows: eyes open or closed.

Training reads from the store as it goes; nothing is loaded beforehand. The classifier is
skorch's, so scikit-learn's tools take it as they take any other.

Usage: python braindecode_classifier.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from braindecode import EEGClassifier
from sklearn.metrics import balanced_accuracy_score
from skorch.helper import predefined_split

import engram
from engram.preparation.steps import HighPass
from engram.testing.hbn import HbnCorpus, write_hbn
from engram.windows import EventColumn, EventWindows, Side, Split

# Windows of two seconds, from two seconds after each instruction on: nine of every instruction.
AT_REST = EventWindows(
    signal="eeg",
    anchor=("instructed_toOpenEyes", "instructed_toCloseEyes"),
    trial_start_offset_s=2.0,
    trial_duration_s=18.0,
    window_size_s=2.0,
)
EYES = EventColumn("description", task="classification")
BY_SUBJECT = Split(test=Side(fraction=0.25), valid=Side(fraction=0.34))


def main(folder: Path) -> None:
    """Prepare, split by subject, train, and score on a subject that was never seen."""
    corpus = folder / "corpus"  # here: your BIDS folder
    if not corpus.exists():
        write_hbn(corpus, HbnCorpus(4, ("R1",), n_runs=1, n_trials=2, quirks=frozenset()))

    engram.prepare(corpus, folder / "store", steps=[HighPass(0.5)], memory="2 GB")
    with engram.open(folder / "store") as store:
        windows = store.windows(AT_REST, EYES)
        assert windows.classes == ("instructed_toCloseEyes", "instructed_toOpenEyes")
        sides = windows.split(BY_SUBJECT)
        train, valid, test = (sides[side].dataset() for side in ("train", "valid", "test"))
        assert (len(train), len(valid), len(test)) == (72, 36, 36)

        torch.manual_seed(0)
        classifier = EEGClassifier(
            "ShallowFBCSPNet",
            module__n_chans=windows.n_chans,
            module__n_times=windows.n_times,
            module__n_outputs=windows.n_outputs,
            optimizer=torch.optim.AdamW,
            optimizer__lr=1e-3,
            train_split=predefined_split(valid),
            batch_size=12,
            max_epochs=6,
            classes=[0, 1],
        )
        classifier.fit(train, y=None)
        losses = classifier.history[:, "train_loss"]
        assert losses[-1] < losses[0]

        true = sides["test"].index.targets(np.arange(len(test)))
        score = balanced_accuracy_score(true, classifier.predict(test))
        print(f"balanced accuracy {score:.2f} on an unseen subject, chance 0.50")
        assert score > 0.5


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
