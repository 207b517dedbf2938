"""The lab: condmod's commands `demo`, `train`, `compare` and `sample`, on real pictures.

Nothing heavy is imported here, so that `condmod --help` answers at once; each room is imported by
who needs it (`condmod_lab.config`, `.network`, `.training`, `.metrics`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping

import condmod


@condmod.hookimpl
def condmod_documents() -> Mapping[str, condmod.Document]:
    """What `condmod train` reads, so that `condmod validate` and `condmod schema` know it too."""
    from condmod_lab.config import TrainConfig, load_config

    return {"train": condmod.Document(TrainConfig, load_config)}
