"""The hubs that publish Kolors: what a repository holds, and the bytes of its files. Hugging Face and ModelScope."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException, HTTPMessage
from typing import Any
from urllib import request
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit

TIMEOUT = 15  # seconds for an answer, and for each piece of a file
_CHUNK = 2**18  # bytes at most; less where the network is slow, so that a wish to stop is heard
_LISTING_LIMIT = 2**24  # bytes; a listing of these repositories has some kilobytes
_TRUE = {"1", "ON", "YES", "TRUE"}
_SECRET_HEADERS = ("Authorization", "Cookie")
_PASSING = {408, 425, 429}  # besides 5xx: answers that may be others a little later


class HubError(RuntimeError):
    """A hub does not give what was asked for. The message says what, why, and what to do."""


class HubUnreachable(HubError):
    """No answer, a broken one, or "not now": the same request may succeed later, or another hub may."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One version of one file in a repository.

    Attributes:
        path: within the repository, with slashes.
        size: bytes.
        url: where its bytes are.
        sha256: of its content, in lower case hexadecimal; None where the hub does not say.
        git_id: of its content as a git blob, which small files have on Hugging Face; None where the hub does not say.
    """

    path: str
    size: int
    url: str
    sha256: str | None = None
    git_id: str | None = None

    def __post_init__(self) -> None:
        if not self.path or self.size < 0:
            raise ValueError(f"The file {self.path!r} of {self.size} bytes is none.")

    @property
    def checksum(self) -> str | None:
        """The published checksum, of whichever kind there is."""
        return self.sha256 or self.git_id

    def start_checksum(self) -> Any:
        """Starts the hash that must end at ``checksum``."""
        if self.sha256 or not self.git_id:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)


class Hub(ABC):
    """A place that publishes repositories of files.

    Attributes:
        name: as users choose it.
        endpoint: the address, without a slash at the end.
        token_hint: how a user gives a token, as a sentence.
    """

    name: str
    endpoint: str
    token_hint: str

    @abstractmethod
    def get_headers(self) -> dict[str, str]:
        """Gives the headers of a request, with the user's token if there is one."""

    @abstractmethod
    def list_files(self, repository: str) -> dict[str, RemoteFile]:
        """Lists the newest version of every file of a repository, by path.

        Raises:
            HubUnreachable: no answer.
            HubError: no such repository, or not for this user.
        """

    def read(self, file: RemoteFile, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yields the bytes of a file from ``start`` on, each piece with where it belongs in the file.

        A server that cannot begin in the middle begins at 0. The pieces never reach beyond the file's size; that they
        reach it is for the caller to check, because a broken connection may just end.

        Raises:
            HubUnreachable: no answer, or it broke off.
            HubError: no such file, or not for this user.
        """
        headers = {**self.get_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with closing(_open(file.url, headers)) as answer:
                position = _get_start(answer.headers, file, start) if answer.status == 206 else 0
                while position < file.size and (chunk := answer.read1(min(_CHUNK, file.size - position))):
                    yield position, chunk
                    position += len(chunk)
        except HTTPError as error:
            raise self._explain(error, file.path, file.url) from error
        except (OSError, HTTPException) as error:
            raise HubUnreachable(f"{self} does not answer ({_get_reason(error)}).") from error

    def _read_json(self, url: str, what: str) -> Any:
        try:
            with closing(_open(url, self.get_headers())) as answer:
                return json.loads(answer.read(_LISTING_LIMIT))
        except HTTPError as error:
            raise self._explain(error, what, url) from error
        except (OSError, HTTPException) as error:
            raise HubUnreachable(f"{self} does not answer ({_get_reason(error)}).") from error
        except ValueError as error:  # a captive portal's page, for instance
            raise HubUnreachable(f"{self} gave no listing of {what} but something else.") from error

    def _explain(self, error: HTTPError, what: str, url: str) -> HubError:
        """Gives the error that a status means. ``what`` names the file or repository that was asked for."""
        said = _read_message(error)
        answer = f"{self} answers {error.code}{f' ({said})' if said else ''} for {what}"
        if error.code >= 500 or error.code in _PASSING:
            return HubUnreachable(f"{answer}. Try again later, or from the other source.")
        if error.code in (401, 403):
            return HubError(
                f"{answer}: it is private or gated, does not exist, or the token is wrong. {self.token_hint}"
            )
        if error.code == 404:
            return HubError(f"{answer}: there is no such thing at {url}. Try the other source.")
        return HubError(f"{answer} ({url}).")

    def __str__(self) -> str:
        return f"{self.name} ({self.endpoint})"


class HuggingFace(Hub):
    """Hugging Face, or the mirror that ``HF_ENDPOINT`` names."""

    name = "huggingface"

    def __init__(self) -> None:
        self.endpoint = _complete(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        self.token_hint = (
            f"Accept the conditions at {self.endpoint} if there are any, then run `hf auth login`, or set HF_TOKEN to "
            "a token of yours that can read it."
        )

    def get_headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(library_name="kolors-nodes")

    def list_files(self, repository: str) -> dict[str, RemoteFile]:
        info = self._read_json(f"{self.endpoint}/api/models/{repository}/revision/main?blobs=true", repository)
        try:
            root = f"{self.endpoint}/{repository}/resolve/{quote(info['sha'], safe='')}"
            files = [
                RemoteFile(
                    path=entry["rfilename"],
                    size=int(entry["size"]),
                    url=f"{root}/{quote(entry['rfilename'])}",
                    sha256=(entry.get("lfs") or {}).get("sha256"),
                    git_id=entry.get("blobId"),
                )
                for entry in info["siblings"]
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HubUnreachable(f"{self} gave no listing of {repository} but something else.") from error
        return {file.path: file for file in files}


class ModelScope(Hub):
    """ModelScope, or the address that ``MODELSCOPE_ENDPOINT`` (``MODELSCOPE_DOMAIN`` of old) names."""

    name = "modelscope"

    def __init__(self) -> None:
        named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN")
        self.endpoint = _complete(named or "https://www.modelscope.cn")
        self.token_hint = f"Set MODELSCOPE_API_TOKEN to a token of yours from {self.endpoint}/my/myaccesstoken."

    def get_headers(self) -> dict[str, str]:
        # The token that the official client keeps on the disk is pickled, so it is not read.
        token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
        # Old addresses of the interface read the cookie, new ones the header.
        secret = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
        return {"User-Agent": "kolors-nodes", **secret}

    def list_files(self, repository: str) -> dict[str, RemoteFile]:
        root = f"{self.endpoint}/api/v1/models/{repository}/repo"
        query = urlencode({"Revision": "master", "Recursive": "True"})
        answer = self._read_json(f"{root}/files?{query}", repository)
        try:
            if not answer.get("Success", True):
                raise HubError(f"{self} refuses {repository}: {answer.get('Message')}. {self.token_hint}")
            files = [
                RemoteFile(
                    path=entry["Path"],
                    size=int(entry["Size"]),
                    url=f"{root}?{urlencode({'Revision': 'master', 'FilePath': entry['Path']})}",
                    sha256=(entry.get("Sha256") or "").lower() or None,
                )
                for entry in answer["Data"]["Files"]
                if entry.get("Type") != "tree"
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HubUnreachable(f"{self} gave no listing of {repository} but something else.") from error
        return {file.path: file for file in files}


def is_offline() -> bool:
    """Tells whether the user has forbidden the network to everything that fetches models."""
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _complete(address: str) -> str:
    address = address.strip().rstrip("/")
    return address if address.lower().startswith(("http://", "https://")) else f"https://{address}"


class _Redirects(request.HTTPRedirectHandler):
    """Follows redirects, to servers of content too, but shows the user's token to nobody but the hub."""

    def redirect_request(
        self, req: request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> request.Request | None:
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if old.scheme == "https" and new.scheme != "https":
            raise HTTPError(newurl, code, f"redirects to the unencrypted {new.scheme}://{new.netloc}", headers, fp)
        if redirected and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            for name in _SECRET_HEADERS:
                redirected.remove_header(name)
        return redirected


def _open(url: str, headers: Mapping[str, str]) -> Any:
    """Opens an address through the proxies of the environment (``HTTPS_PROXY``, ``NO_PROXY``, …)."""
    opener = request.OpenerDirector()  # with what reads HTTP and nothing else: no local files, no FTP
    handlers = (
        request.ProxyHandler(),
        request.HTTPHandler(),
        request.HTTPSHandler(context=_get_certificates()),
        request.HTTPDefaultErrorHandler(),
        request.HTTPErrorProcessor(),
        request.UnknownHandler(),
        _Redirects(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    return opener.open(request.Request(url, headers=dict(headers)), timeout=TIMEOUT)


@cache
def _get_certificates() -> ssl.SSLContext:
    """Gives the system's certificates, those of certifi where it is installed, and those that the user names."""
    context = ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        pass
    else:
        context.load_verify_locations(certifi.where())
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if named:
        context.load_verify_locations(**{"capath" if os.path.isdir(named) else "cafile": named})
    return context


def _get_start(headers: HTTPMessage, file: RemoteFile, wanted: int) -> int:
    """Gives where in the file a partial answer begins."""
    span, _, total = headers.get("Content-Range", "").removeprefix("bytes").strip().partition("/")
    start = span.partition("-")[0]
    if start != str(wanted) or total not in (str(file.size), "*"):
        raise HTTPException(f"it gave the bytes {span} of {total} in place of {wanted}- of {file.size}")
    return wanted


def _get_reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"{reason}: something in between shows a certificate of its own; SSL_CERT_FILE names trusted ones"
    return str(reason) or type(reason).__name__


def _read_message(error: HTTPError) -> str:
    """Gives what the hub says of an error, in one line."""
    said = error.headers.get("X-Error-Message") or ""
    if not said:
        try:
            answer = json.loads(error.read(2**16))
            said = answer.get("error") or answer.get("Message") or ""
        except (OSError, HTTPException, ValueError, AttributeError):
            pass
    return " ".join(str(said or error.reason).split())[:200]
