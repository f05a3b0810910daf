"""Repositories of the model hub: their files, and whether the hub can be asked for them.

Imports nothing heavy.
"""

import os
import queue
import re
import socket
import threading
import time
from urllib.parse import urlsplit

from hermesflow.files import InputError, read_object, reason

# of a folder with a model or a tokenizer, one of
MARKS = {"config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"}
PATIENCE = 3  # seconds until a hub that does not answer is out of reach
PART = r"(?!.*(--|\.\.))[A-Za-z0-9_]([\w.-]{0,94}[A-Za-z0-9_])?"
REPOSITORY = re.compile(f"{PART}(/{PART})?", re.ASCII)  # owner/name, or name
TRIED = {}  # endpoint -> why it cannot be reached, or an empty text


def find(repository: str, name: str) -> str | None:
    """The path of a file of a hub repository, downloaded if need be, or None if it has no such one.

    Raises InputError if there is no such repository in reach. Without a connection, what is in the
    hub's cache is all that a repository has.
    """
    refuse_path(repository)
    from huggingface_hub import constants, errors, hf_hub_download  # slow, and rarely needed

    offline = why_offline()
    endpoint = constants.ENDPOINT
    try:
        return hf_hub_download(repository, name, local_files_only=bool(offline))
    except errors.LocalEntryNotFoundError as error:
        if not offline:
            message = f"{name} cannot be downloaded from {endpoint}"
            cause = error.__cause__ or error
            raise InputError(f"{repository}: {message} ({reason(cause)})") from None
        if not is_cached(repository):
            message = f"neither a folder here nor in the hub's cache ({constants.HF_HUB_CACHE})"
            raise InputError(f"{repository}: {message}, and {offline}") from None
        return None
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError:
        message = "gives it to those who have accepted its terms and are logged in (hf auth login)"
        raise InputError(f"{repository}: {endpoint}/{repository} {message}") from None
    except errors.RepositoryNotFoundError:
        message = f"neither a folder here nor a public repository of {endpoint}"
        raise InputError(f"{repository}: {message}") from None
    except Exception as error:  # no space left, a broken connection, …
        message = f"{name} cannot be downloaded from {endpoint} ({reason(error)})"
        raise InputError(f"{repository}: {message}") from None


def fetch(repository: str, name: str) -> str:
    """The path of a file that the repository must have. Raises InputError if there is none."""
    path = find(repository, name)
    if path is None:
        raise InputError(f"{repository}: {absent(name)}")
    return path


def require(*names: str | None) -> None:
    """Raises InputError unless each name is something here, or a repository in reach.

    Asked before torch is imported, so that a typo is answered in a moment.
    """
    for name in filter(None, names):
        if not os.path.exists(name):
            find(str(name), "config.json")
        elif os.path.isdir(name) and not MARKS.intersection(os.listdir(name)):
            raise InputError(f"{name}: holds no config.json, and no tokenizer")


def absent(name: str) -> str:
    """What to say of a file that `find` did not find."""
    from huggingface_hub.constants import HF_HUB_CACHE

    offline = why_offline()
    if not offline:
        return f"{name} is missing"
    return f"{name} is not in the hub's cache ({HF_HUB_CACHE}), and {offline}"


def lacks(repository: str, groups: tuple[tuple[str, ...], ...]) -> str:
    """What the cache lacks if the hub cannot be asked; of each group of names, one is needed."""
    if not why_offline():
        return ""
    for group in groups:
        path = next(filter(None, (find(repository, name) for name in group)), None)
        if path is None:
            return absent(" or ".join(group))
        if path.endswith(".index.json"):
            shards = dict(read_object(path).get("weight_map") or {}).values()
            missing = sorted(n for n in set(shards) if find(repository, n) is None)
            if missing:
                return absent(missing[0])
    return ""


def refuse_path(name: str) -> None:
    """Raises InputError for the name of a folder that is not there: the hub need not be asked."""
    if not REPOSITORY.fullmatch(name):
        raise InputError(f"{name}: no such folder, and no name of a hub repository")
    owner, _, rest = name.partition("/")
    if rest and os.path.isdir(owner) and not is_cached(name):
        remedy = f"hf download {name} --local-dir {name}"
        raise InputError(f"{name}: no such folder in {owner} (if the hub has it: {remedy})")


def is_cached(repository: str) -> bool:
    """Whether any file of a repository is in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = "models--" + repository.replace("/", "--")
    return os.path.isdir(os.path.join(HF_HUB_CACHE, folder, "snapshots"))


# --------------------------------------------------------------------------------- the connection


def why_offline() -> str:
    """Why the hub is not asked, or an empty text."""
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE and not TRIED.get(endpoint):
        return "HF_HUB_OFFLINE is set"
    return "" if reachable() else f"{endpoint} cannot be reached ({TRIED[endpoint]})"


def reachable() -> bool:
    """Whether the hub can be connected to, tried once in a process.

    If not, libraries are told to be content with its cache: each of their requests would otherwise
    be repeated for half a minute.
    """
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if endpoint not in TRIED:
        TRIED[endpoint] = failure(endpoint)
        if TRIED[endpoint]:
            os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that this one starts
            constants.HF_HUB_OFFLINE = True
    return not TRIED[endpoint]


def failure(url: str) -> str:
    """Why no connection to a server is made, or an empty text. A proxy is trusted to make it."""
    from urllib.request import getproxies, proxy_bypass

    place = urlsplit(url)
    proxies = getproxies()
    if (place.scheme in proxies or "all" in proxies) and not proxy_bypass(place.hostname):
        return ""
    answers = queue.SimpleQueue()

    def connect(family):
        try:
            port = place.port or {"http": 80}.get(place.scheme, 443)
            address = socket.getaddrinfo(place.hostname, port, family, socket.SOCK_STREAM)[0][-1]
            with socket.socket(family, socket.SOCK_STREAM) as connection:
                connection.settimeout(PATIENCE)
                connection.connect(address)
            answers.put("")
        except (OSError, ValueError) as error:  # ValueError: a port that is no number
            answers.put(getattr(error, "strerror", None) or str(error))

    # in threads, as looking up a name cannot be told to hurry; a network may have one family only
    families = (socket.AF_INET6, socket.AF_INET)
    for family in families:
        threading.Thread(target=connect, args=(family,), daemon=True).start()
    end = time.monotonic() + PATIENCE
    for _ in families:
        try:
            why = answers.get(timeout=max(0, end - time.monotonic()))
        except queue.Empty:
            return f"no answer in {PATIENCE} s"
        if not why:
            return ""
    return why
