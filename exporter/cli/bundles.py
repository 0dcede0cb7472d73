"""What the deployed side does with a bundle beside running it: verify it, read its report. No torch."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli.console import Console, print_json

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))


@click.command()
@BUNDLE
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Public key that must have signed it.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def verify(bundle: Path, key: Path | None, as_json: bool) -> None:
    """Compare every byte of BUNDLE with its manifest, and its signature with a key."""
    from exporter.bundle.verify import verify_bundle

    console = Console()
    console.begin("verify", bundle.name)
    found = verify_bundle(bundle, key, progress=console.advance)
    if found.signer:
        signature = f"signed by key {found.signer}"
    else:
        signature = "signed, signature not checked: give --key" if found.signed else "not signed"
    if as_json:
        print_json(
            {
                "bundle": str(bundle), "name": found.manifest.name, "digest": found.manifest.digest,
                "files": found.files, "bytes": found.size, "signed": found.signed, "signer": found.signer,
            }
        )  # fmt: skip
        return
    click.echo(
        f"{bundle}: {found.files} files, {found.size / 1e6:.2f} MB, all as packaged; {signature}"
    )
    click.echo(f"manifest digest {found.manifest.digest}")


@click.command()
@BUNDLE
@click.option("--open", "show", is_flag=True, help="Show it in this machine's browser.")
def report(bundle: Path, show: bool) -> None:
    """Say where BUNDLE's report is (one HTML file, no network), and show it."""
    import webbrowser

    from exporter.core.errors import EnvironmentLacks, InputRefused

    path = bundle / "reports" / "report.html"
    if not path.is_file():
        raise InputRefused(f"{path}: no report; expected a bundle that was built with a comparison")
    click.echo(path)
    if show and not webbrowser.open(path.resolve().as_uri()):
        raise EnvironmentLacks(f"no browser was found here; open {path} on another machine")


@click.command()
@click.argument("stem", type=click.Path(path_type=Path))
def keygen(stem: Path) -> None:
    """Make a signing key pair: STEM.pem stays with the maker, STEM.pub.pem goes to the sites."""
    from exporter.bundle.sign import write_keys

    private, public = write_keys(stem)
    click.echo(f"private key {private} (keep it offline), public key {public}")


COMMANDS = (verify, report, keygen)
