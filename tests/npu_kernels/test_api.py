# SPDX-License-Identifier: Apache-2.0
"""Every name of Ascend C that the kernels use has its public declaration in API.md, and stands in the CPU twin."""

import re

from .twin import SOURCES

ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| `(kernel_\w+\.h)`", re.MULTILINE)


def kernel_sources():
    files = [path for kind in ("h", "asc") for path in SOURCES.glob(f"*/*.{kind}") if path.parent.name != "twin"]
    assert len(files) > 30
    return {path: re.sub(r"//.*|/\*.*?\*/|#include.*", "", path.read_text()) for path in files}


def defined_here(code):
    """Names of our own that look like Ascend C's: classes, structures, constants and template parameters."""
    return set(re.findall(r"(?:class|struct|enum class|typename) (\w+)", code))


def used_names():
    sources = kernel_sources()
    ours = set().union(*(defined_here(code) for code in sources.values()))
    names = set()
    for code in sources.values():
        names |= set(re.findall(r"\b[A-Z][a-z]\w*|\bTPipe\b|\bTQue\b|\bTBuf\b|\bTPosition\b", code))
    return names - ours - {"AscendC", "Launch", "Memory", "Sums"}  # the last three are of launch.h


def table():
    return {name: declaration for name, declaration, _ in ROW.findall((SOURCES / "API.md").read_text())}


def test_every_used_name_is_in_the_table_and_nothing_else():
    assert used_names() == set(table())


def test_every_declaration_names_what_it_declares():
    for name, declaration in table().items():
        assert declaration.startswith(("as `", "`(", "six", "`VEC", "`CAST", "`S_V")) or name in declaration, name


def test_every_name_is_in_the_twin():
    twin = "".join(path.read_text() for path in (SOURCES / "twin").glob("*.h"))
    defined = r"(class|struct) {0}\b|\b{0}\(|TWIN_\w+\({0},"
    assert not [name for name in table() if not re.search(defined.format(name), twin)]


def test_the_twin_defines_nothing_that_no_kernel_uses():
    """What it had beyond would be checked by nothing. GetValue is there for a test of the twin itself."""
    twin = "".join(path.read_text() for path in (SOURCES / "twin").glob("*.h"))
    public = set(
        re.findall(r"^(?:  )?(?:void|bool|LocalTensor<\w>|int64_t|inline int64_t|T) ([A-Z]\w+)\(", twin, re.MULTILINE)
    )
    public |= set(re.findall(r"TWIN_\w+\((\w+),", twin))
    assert public - {"GetValue", "NAME"} <= set(table())
