"""An object store in the folder $BUCKET_ROOT, at bucket://: no rename, no links, and a fault on demand.

BUCKET_END=FILE: the process dies while it puts such a file; with BUCKET_RAISES it is an error instead. A process that imports
this module has the store.
"""

import os
import pathlib

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Bucket(LocalFileSystem):
    protocol = "bucket"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        root = os.environ["BUCKET_ROOT"]
        path = str(path)
        return path.rstrip("/") if path.startswith(root) else root + "/" + path.removeprefix("bucket://").strip("/")

    def _put(self, rpath, content):
        os.makedirs(os.path.dirname(rpath), exist_ok=True)
        end = os.environ.get("BUCKET_END")
        if end and rpath.endswith(end):
            pathlib.Path(rpath).write_bytes(content[: len(content) // 2])
            if os.environ.get("BUCKET_RAISES"):
                raise OSError("connection reset by peer")
            os._exit(9)
        pathlib.Path(rpath).write_bytes(content)

    def put_file(self, lpath, rpath, **rest):
        self._put(self._strip_protocol(rpath), pathlib.Path(lpath).read_bytes())

    def get_file(self, rpath, lpath, **rest):
        pathlib.Path(lpath).write_bytes(pathlib.Path(self._strip_protocol(rpath)).read_bytes())

    def pipe_file(self, path, value, **rest):
        self._put(self._strip_protocol(path), value)

    def mv(self, *names, **rest):
        raise NotImplementedError

    mv_file = link = symlink = mv


fsspec.register_implementation("bucket", Bucket, clobber=True)
