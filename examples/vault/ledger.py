"""Keeps secrets in an encrypted pool: `python ledger.py KEYFILE`."""

import sys

import latzero

app = latzero.connect(f"latzero://ledger?pool=vault&keys={sys.argv[1]}")
secrets: dict[str, str] = {}


@app.serve
def keep(name: str, secret: str) -> int:
    """Keeps a secret under a name; the number of secrets."""
    secrets[name] = secret
    return len(secrets)


@app.serve
def reveal(name: str) -> str:
    if name not in secrets:
        raise latzero.Failure("no_secret", f"there is no secret called {name!r}")
    return secrets[name]


print("ready", flush=True)
app.wait()
