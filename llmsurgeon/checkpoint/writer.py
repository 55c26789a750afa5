"""Write a checkpoint: staged in OUT.partial, resumed after a kill, renamed to OUT when all of it is there.

The journal of the staging folder names the job and every finished weight file. Tensors that no edit touches go from
file to file inside the kernel; only edited ones pass through memory, a block at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from llmsurgeon.checkpoint.atomic import fsync
from llmsurgeon.checkpoint.checksums import MANIFESTS, Checksum, checksum_of, file_sum
from llmsurgeon.checkpoint.disk import NOTHING, explained
from llmsurgeon.checkpoint.following import FollowingSum
from llmsurgeon.checkpoint.index import INDEX
from llmsurgeon.checkpoint.manifest import is_plain, own_manifest, read_manifest, write_manifest
from llmsurgeon.checkpoint.shards import Shard, index_json, meta_weights, parse_size, plan_shards
from llmsurgeon.checkpoint.sharing import aligned, shared_blocks
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.staging import Staging
from llmsurgeon.checkpoint.transform import root_of
from llmsurgeon.checkpoint.weight_file import Manner, Progress, Reporter, copied, write_shard
from llmsurgeon.errors import CheckpointError

MAX_SUMS = 3  # SHA-256 runs at about a third of the speed of a copy


class Stage(Staging):
    """The staging folder of one output folder. `commit()` makes OUT appear, with a manifest of its files."""

    checksum: Checksum = checksum_of("blake3")
    _weights_written = False

    def write_file(self, name: str, content: str | bytes) -> None:
        """Write one small file, which may lie in a folder."""
        path = self._inside(name)
        with explained(path, len(content)):
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            with path.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)

    def copy_file(self, source: Path, name: str | None = None) -> None:
        """Copy one small file (links followed), under `name` if given, which may lie in a folder."""
        path = self._inside(name or source.name)
        with explained(path):
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            shutil.copyfile(source, path)

    def take(self, folder: Path) -> None:
        """Move every file of a folder that this tool wrote in here; its manifest is written anew."""
        manifest = own_manifest(folder)
        assert manifest, f"{folder} is nobody's output"
        for name in read_manifest(manifest):
            path = self._inside(name)
            with explained(path):
                path.parent.mkdir(exist_ok=True)
                shutil.move(folder / name, path)
        self.checksum = MANIFESTS[manifest.name]

    def _inside(self, name: str) -> Path:
        if not is_plain(name) or name in MANIFESTS:
            raise AssertionError(f"{name!r} is not a file name for a checkpoint")
        return self.path / name

    def write_weights(
        self,
        weights: Mapping[str, Tensor],
        *,
        max_shard_size: int | str = "5GB",
        checksum: str = "blake3",
        progress: Progress | None = None,
        check_finite: bool = True,
    ) -> int:
        """Write every tensor of `weights`, and the index where there is more than one file; return the bytes written.

        A source checkpoint that changed meanwhile is found out at the end, and nothing is kept.
        Bytes that no edit touches are copied from file to file. Files that a killed run of the same job finished
        are kept once their `checksum`, by which the manifest will be, has been checked. `progress` is called with
        (bytes done, bytes in total).

        Raises:
            SurgeryError: a computed tensor holds NaN or infinity, the disk fails or is full, the source changed.
        """
        if self._weights_written:
            raise AssertionError("write_weights was called twice on one stage")
        self.checksum = checksum_of(checksum)
        meta = meta_weights(weights)
        shards = self._sharing(plan_shards(weights, meta, parse_size(max_shard_size)), weights, meta)
        total = sum(shard.size for shard in shards)
        done = {shard.file: total_sum for shard in shards if (total_sum := self._finished(shard)) is not None}
        self._drop_unplanned(set(done))
        self._check_space(total)
        manner = Manner(self.checksum, check_finite, Reporter(progress, total))
        sums: list[FollowingSum] = []
        try:
            for shard in shards:
                if shard.file in done:
                    manner.report(shard.size)
                    continue
                while len(sums) >= MAX_SUMS:
                    self._record(sums.pop(0))
                with explained(self.path / shard.file, shard.size):
                    sums.append(write_shard(self.path, shard, weights, meta, manner))
            for following in sums:
                self._record(following)
        except BaseException:
            # These files are whole: kept, they need not be made again.
            for following in sums:
                with suppress(Exception):
                    self._record(following)
            raise
        self.confirm(root.check_unchanged if isinstance(root := root_of(weights), Checkpoint) else None)
        if len(shards) > 1:
            self.write_file(INDEX, index_json(shards, meta))
        self._weights_written = True
        return total

    def _sharing(self, shards: list[Shard], weights: Mapping[str, Tensor], meta: Mapping[str, Tensor]) -> list[Shard]:
        """The shards, with what is copied so placed that the file system can share it, where it can."""
        copies = [list(copied(shard, weights, meta)) for shard in shards]
        source = next((each.path for copy in copies for _, each in copy), None)
        block = shared_blocks(source, self.path) if source else 0
        return [aligned(shard, copy, block) for shard, copy in zip(shards, copies, strict=True)] if block else shards

    def confirm(self, check: Callable[[], None] | None) -> None:
        """Call `check`, which raises where something that was read is not what it was when it was opened.

        The weight files may then be of two sources: they are dropped, so that no run goes on with them.
        """
        try:
            if check:
                check()
        except CheckpointError:
            self._drop_unplanned(set())
            raise

    def _finished(self, shard: Shard) -> str | None:
        """The checksum of a file that an earlier run finished, if it is still what the journal says."""
        entry = self._journal.files.get(shard.file)
        path = self.path / shard.file
        if (
            not entry
            or entry["key"] != shard.key
            or entry.get("manifest") != self.checksum.manifest
            or not path.is_file()
            or path.is_symlink()
            or path.stat().st_size != shard.size
        ):
            return None
        return entry["sum"] if file_sum(path, self.checksum) == entry["sum"] else None

    def _drop_unplanned(self, keep: set[str]) -> None:
        self._journal.values["files"] = {file: entry for file, entry in self._journal.files.items() if file in keep}
        self._journal.save()
        for path in [*self.path.glob("*.safetensors"), self.path / INDEX]:
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def _record(self, following: FollowingSum) -> None:
        with explained(following.path):
            entry = {"sum": following.result(), "manifest": self.checksum.manifest, "key": following.key}
            self._journal.files[following.path.name] = entry
            self._journal.save()

    def commit(self) -> Path:
        """Write the manifest, flush everything to disk and make OUT appear. Returns OUT."""
        with explained(self.path):
            known = {file: entry["sum"] for file, entry in self._journal.files.items()}
            write_manifest(self.path, self.checksum, known)
            for path in [*sorted(self.path.rglob("*")), self.path]:
                fsync(path)
        self._publish()
        return self.out


class FileStage(Staging):
    """The staging folder of an output that is one file, to be written to `path`. `commit()` makes OUT appear."""

    single_file = True

    def commit(self) -> Path:
        """Flush the file to disk and make OUT appear. Returns OUT."""
        with explained(self.path, then=NOTHING):
            fsync(self.path)
        self._publish()
        return self.out
