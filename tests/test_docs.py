"""Documents say what is true of this checkout: commands, options, links, versions."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import tyro

import jgia
from jgia import cli

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "python -m pip install . && jgia audit"
TEST = 'python -m pip install -e ".[test]" && python -m pytest'
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "kernels" / "README.md",
        ROOT / "benchmarks" / "README.md",
    ]
)
COMMANDS = {"audit", "craft", "attack", "risk", "train-victim", "train-prior", "sweep", "inspect"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
ELSEWHERE = {  # options of other commands than jgia
    "--add": "benchmarks/end_to_end.py",
    "--quick": ".ci/run",
    "--device": "benchmarks/gradient_matching.py",
    "--peer-python": "benchmarks/gradient_matching.py",
    "--smoke": "benchmarks/ares_cnn.py",
    "--out": "benchmarks/ares_cnn.py",
    "--work": "benchmarks/risk_agreement.py",
}


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text("utf-8"))


def blocks(path: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(path.read_text("utf-8")) if kind == language]


def jgia_lines() -> list[str]:
    code = [code for path in DOCUMENTS for code in blocks(path, "sh")]
    return sorted({x for block in code for x in block.splitlines() if x.startswith("jgia ")})


def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return set(OPTION.findall(capsys.readouterr().out))


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def citation(key: str, text: str) -> str:
    (value,) = re.findall(rf"^{key}: *(.+)$", text, re.MULTILINE)
    return value.strip().strip("\"'")


def test_readme_shows_the_two_commands():
    lines = [line for code in blocks(ROOT / "README.md", "sh") for line in code.splitlines()]
    assert lines.count(INSTALL) == 1
    assert lines.count(TEST) == 1


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert f"install_command='{INSTALL}'" in script
    assert f"test_command='{TEST}'" in script
    for name in ("install_command", "test_command"):
        assert f'readme_line "${name}"' in script


def test_ci_names_no_machine_and_no_registry():
    for path in (ROOT / ".ci").iterdir():
        found = re.findall(
            r"https?://|/home/|/usr/(?!bin/env)|/opt/|index-url", path.read_text("utf-8")
        )
        assert not found, (path.name, found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_local_links_resolve(path: Path):
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path if not name else path.parent / name
        assert file.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{path.name} links to {target}"


def test_every_document_is_reachable_from_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link).resolve() for link in LINK.findall(index.read_text("utf-8"))}
    assert set((ROOT / "docs").glob("*.md")) - {index} <= linked


def test_documented_options_exist(capsys: pytest.CaptureFixture[str]):
    known = set().union(*(options_of(command, capsys) for command in COMMANDS))
    assert {"--data", "--crafted", "--layout"} <= known
    for path in DOCUMENTS:
        # Lines that start with another program are checked by running them.
        text = "\n".join(
            line
            for line in path.read_text("utf-8").splitlines()
            if not re.match(r"(python|pre-commit|bash) ", line)
        )
        for option in set(OPTION.findall(text)) - known:
            home = ELSEWHERE.get(option)
            assert home, f"{path.name} names {option}, which no command has"
            assert option in (ROOT / home).read_text("utf-8")


def test_documented_commands_parse():
    lines = jgia_lines()
    assert {line.split()[1] for line in lines} == COMMANDS
    for line in lines:
        tyro.cli(
            cli._Command,  # pyright: ignore[reportArgumentType]
            args=cli._named(shlex.split(line)[1:]),
            config=(tyro.conf.OmitArgPrefixes,),
        )


def test_command_with_a_wrong_option_does_not_parse(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["audit", "--no-such-option", "1"])
    capsys.readouterr()


def test_documented_python_compiles():
    code = [(path, block) for path in DOCUMENTS for block in blocks(path, "python")]
    assert code
    for path, block in code:
        compile(block, path.name, "exec")


def test_versions_agree():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    cff = (ROOT / "CITATION.cff").read_text("utf-8")
    assert citation("version", cff) == jgia.__version__ == project["version"]
    assert f"## [{jgia.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert citation("license", cff) == project["license"]


def test_citation_has_what_the_format_requires():
    cff = (ROOT / "CITATION.cff").read_text("utf-8")
    assert "\t" not in cff
    assert citation("cff-version", cff) == "1.2.0"
    keys = re.findall(r"^([a-z][a-z-]*):", cff, re.MULTILINE)
    assert {"cff-version", "message", "title", "authors", "references"} <= set(keys)
    assert len(keys) == len(set(keys))
    references = re.split(r"^  - (?=type:)", cff.split("\nreferences:\n")[1], flags=re.MULTILINE)[
        1:
    ]
    assert len(references) == 3
    for reference in references:
        assert {"type", "title", "authors"} <= set(re.findall(r"^ *([a-z]+):", reference, re.M))
    assert "arXiv:2603.17623" in cff


def test_license_is_the_standard_text():
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert text.split("\n", 3)[1].strip() == "Apache License"
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) == 11358


def test_documents_name_no_machine():
    for path in DOCUMENTS:
        assert not re.findall(r"/tmp/|/root/|/home/", path.read_text("utf-8")), path.name
