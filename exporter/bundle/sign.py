"""Ed25519 signatures over manifest.json, made and checked offline.

The signature file is the raw 64 bytes, so that a site without Python can check it too:
``openssl pkeyutl -verify -pubin -inkey key.pub.pem -rawin -in manifest.json -sigfile manifest.sig``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.bundle.manifest import MANIFEST, SIGNATURE
from exporter.core.digest import sha256_bytes
from exporter.core.errors import InputRefused, require

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )


def write_keys(stem: Path) -> tuple[Path, Path]:
    """Make a key pair: `stem`.pem (private, mode 600, not encrypted) and `stem`.pub.pem.

    Raises `InputRefused` when one of the files exists.
    """
    require("cryptography", "sign")
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private, public = stem.with_name(stem.name + ".pem"), stem.with_name(stem.name + ".pub.pem")
    for path in (private, public):
        if path.exists():
            raise InputRefused(f"{path} exists; a key is never overwritten, choose another name")
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    public.write_bytes(
        key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def sign_bundle(bundle: Path, key: Path) -> str:
    """Write manifest.sig with the private key in the PEM file `key`; returns its fingerprint."""
    private = _private(key)
    signature = private.sign((bundle / MANIFEST).read_bytes())
    (bundle / SIGNATURE).write_bytes(signature)
    return fingerprint(private.public_key())


def check_signature(bundle: Path, key: Path) -> str:
    """Fingerprint of the public key in `key` after checking manifest.sig with it.

    Raises `InputRefused` when there is no signature or it does not fit.
    """
    from cryptography.exceptions import InvalidSignature

    public = _public(key)
    path = bundle / SIGNATURE
    if not path.is_file():
        raise InputRefused(
            f"{bundle}: not signed (no {SIGNATURE}), and a key was given; ask for the signature"
        )
    try:
        public.verify(path.read_bytes(), (bundle / MANIFEST).read_bytes())
    except InvalidSignature:
        raise InputRefused(
            f"{bundle}: {SIGNATURE} was not made by {key} over this manifest; do not use the bundle"
        ) from None
    return fingerprint(public)


def fingerprint(public: Ed25519PublicKey) -> str:
    """SHA-256 of the raw 32-byte public key, in hex."""
    return sha256_bytes(public.public_bytes_raw())


def _private(path: Path) -> Ed25519PrivateKey:
    require("cryptography", "sign")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise InputRefused(
            f"{path}: not a private key ({error}); expected an unencrypted PEM file"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputRefused(f"{path}: not an Ed25519 key; `medexport keygen` makes one")
    return key


def _public(path: Path) -> Ed25519PublicKey:
    require("cryptography", "sign")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise InputRefused(f"{path}: not a public key ({error}); expected a PEM file") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputRefused(f"{path}: not an Ed25519 key; `medexport keygen` makes one")
    return key
