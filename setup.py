"""Package metadata comes from settings.ini, which nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = parser["DEFAULT"]


def lines(key):
    return settings.get(key, "").strip().splitlines()


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=["musekit", "musekit.*"]),
    package_data={"musekit": ["configs/*.yaml", "pretrained/*/*", "pretrained/*/*/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=lines("requirements"),
    extras_require={name: lines(f"{name}_requirements") for name in ("lab", "polars", "text", "dev")},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["musekit=musekit._modidx:d"]},
)
