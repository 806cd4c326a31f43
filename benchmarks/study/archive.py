"""A study's finished runs as one file, from which it is reported and continued."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from comfyui_pcpo.durable import write_durably
from trainer.config.schema import ConfigError

from .studies import Study


def archived_files(study: Study, out: Path) -> Iterator[Path]:
    """Results of the finished cells, metrics of the reported ones, the front of two rewards, and the measured speed."""
    for result in sorted(out.glob("cells/*/*/*/*/result.json")):
        yield result
        metrics = result.with_name("metrics.jsonl")
        tuned = result.parent.name.endswith(tuple(f"-seed{seed}" for seed in study.tuning_seeds))
        if not tuned and metrics.is_file():  # absent where the first update overflowed
            yield metrics
    others = ("guidance.json", "peers.json", "speed/*.json", "speed/commit.txt")
    yield from sorted(file for pattern in others for file in out.glob(pattern))


def write_archive(study: Study, out: Path, file: Path) -> int:
    """Write the finished cells of a study's folder, -> their number. Equal runs give equal files."""
    files = list(archived_files(study, out))
    if not files:
        raise ConfigError(f"{out} has no finished runs. Give the --out and the --study of a run.")
    file.parent.mkdir(parents=True, exist_ok=True)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        for path in files:
            tar.add(path, f"{out.name}/{path.relative_to(out).as_posix()}", recursive=False, filter=anonymous)
    write_durably(file, archive.getbuffer())
    return sum(path.name == "result.json" for path in files)


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """The entry without owner, time and umask."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry
