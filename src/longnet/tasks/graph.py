"""A knowledge graph of documents: networkx in memory; GraphML, JSON-LD or a picture on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from longnet.tasks.annotations import Annotation
from longnet.tasks.documents import Document
from longnet.tasks.mentions import normalise

# More nodes than this are a ball of wool, not a picture.
PICTURE_NODES = 60
_NAMESPACE = "urn:longnet:"
# What XML 1.0 cannot hold, lone surrogates included.
_UNWRITABLE = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def writer(path: Path) -> Callable[[Any, Path], None]:
    """The function that writes a graph to a path of this name; raises before any work if it cannot be done.

    Raises:
        ValueError: a suffix other than .graphml, .jsonld, .png, .svg or .pdf; networkx or matplotlib is missing.
    """
    writers = {".graphml": write_graphml, ".jsonld": write_jsonld, ".png": draw, ".svg": draw, ".pdf": draw}
    if path.suffix not in writers:
        raise ValueError(f"graph: expected a file name ending in {', '.join(writers)}; got {path}")
    for package in ("networkx", "matplotlib") if writers[path.suffix] is draw else ("networkx",):
        try:
            import_module(package)
        except ImportError:
            raise ValueError(
                f"graph: expected the package {package}; it is not installed; pip install {package}"
            ) from None
    if not path.parent.is_dir():
        raise ValueError(f"graph: expected an existing folder; got {path.parent}")
    return writers[path.suffix]


def build_graph(items: Iterable[tuple[Document, Annotation]], merge: bool = False) -> Any:
    """networkx.MultiDiGraph with a node per entity and an edge per relation.

    A node has `label`, `name` and `mentions`, a list of {document, start, end, text}; an edge has `label` and
    `documents`, a list, and its label as key. Entities of different documents are different nodes; with `merge`, those
    with the same label and the same normalised name (NFKC, case folded, white space joined) are one.
    """
    import networkx as nx

    graph = nx.MultiDiGraph()
    for document, annotation in items:
        nodes = {}
        for name, members in annotation.clusters.items():
            label = annotation.label(name)
            nodes[name] = node = f"{label}/{normalise(name)}" if merge else f"{document.id}#{name}"
            if node not in graph:
                graph.add_node(node, label=label, name=name, mentions=[])
            for start, end, _ in (annotation.spans[i] for i in members):
                text = document.text[start:end]
                graph.nodes[node]["mentions"].append(
                    {"document": document.id, "start": start, "end": end, "text": text}
                )
        for head, tail, label in annotation.relations:
            ends = nodes[head], nodes[tail]
            if not graph.has_edge(*ends, key=label):
                graph.add_edge(*ends, key=label, label=label, documents=[])
            if document.id not in (documents := graph.edges[*ends, label]["documents"]):
                documents.append(document.id)
    return graph


def write_graphml(graph: Any, path: Path) -> None:
    """GraphML; lists are JSON strings. Characters that XML cannot hold become U+FFFD, also in `mentions`: offsets stay exact."""
    import networkx as nx

    def plain(value: Any) -> str:
        value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return _UNWRITABLE.sub("\ufffd", value)

    names = {node: plain(node) for node in graph}
    if len(set(names.values())) < len(names):
        names = {node: f"{plain(node)}~{i}" for i, node in enumerate(graph)}
    flat = nx.MultiDiGraph()
    for node, data in graph.nodes(data=True):
        flat.add_node(names[node], **{k: plain(v) for k, v in data.items()})
    for head, tail, key, data in graph.edges(keys=True, data=True):
        flat.add_edge(names[head], names[tail], key=plain(key), **{k: plain(v) for k, v in data.items()})
    nx.write_graphml(flat, path)


def write_jsonld(graph: Any, path: Path) -> None:
    """JSON-LD 1.1: a node object per entity, `@type` its label, one property per relation, the ends as `@id`s.

    IRIs are urn:longnet:entity:, urn:longnet:label: and urn:longnet:relation: with the percent-encoded name.
    """

    def iri(kind: str, name: str) -> str:
        return f"{_NAMESPACE}{kind}:{quote(name, safe='', errors='surrogatepass')}"

    nodes = []
    for node, data in graph.nodes(data=True):
        record: dict[str, Any] = {
            "@id": iri("entity", node),
            "@type": iri("label", data["label"]),
            "name": data["name"],
            "mentions": data["mentions"],
        }
        for _, tail, label in graph.out_edges(node, keys=True):
            record.setdefault(iri("relation", label), []).append({"@id": iri("entity", tail)})
        nodes.append(record)
    context = {
        "@version": 1.1,
        "name": "http://schema.org/name",
        "mentions": {"@id": f"{_NAMESPACE}mentions", "@type": "@json"},
    }
    # ASCII: a lone surrogate, which stands for an undecodable byte, is no UTF-8.
    path.write_text(json.dumps({"@context": context, "@graph": nodes}, indent=1))


def read_jsonld(path: Path) -> Any:
    """The graph that `write_jsonld` wrote, without the edges' documents."""
    import networkx as nx

    def name(iri: str) -> str:
        return unquote(iri.removeprefix(_NAMESPACE).partition(":")[2], errors="surrogatepass")

    graph = nx.MultiDiGraph()
    records = json.loads(path.read_text())["@graph"]
    for record in records:
        graph.add_node(
            name(record["@id"]), label=name(record["@type"]), name=record["name"], mentions=record["mentions"]
        )
    for record in records:
        for key, tails in record.items():
            if key.startswith(f"{_NAMESPACE}relation:"):
                for tail in tails:
                    graph.add_edge(name(record["@id"]), name(tail["@id"]), key=name(key), label=name(key))
    return graph


def draw(graph: Any, path: Path) -> None:
    """A picture of the entities that take part in relations (of all, if there is no relation), coloured by label.

    Raises:
        ValueError: more than PICTURE_NODES of them.
    """
    import networkx as nx

    shown = graph.subgraph([node for node in graph if graph.degree(node)] or list(graph))
    if len(shown) > PICTURE_NODES:
        raise ValueError(
            f"graph: expected at most {PICTURE_NODES} entities in a picture; got {len(shown)}; write .graphml or .jsonld and"
            " open it in a viewer, or give fewer documents"
        )
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = sorted({data["label"] for _, data in shown.nodes(data=True)})
    colours = matplotlib.color_sequences["Set2"]
    side = 5 + len(shown) ** 0.5
    figure, axes = plt.subplots(figsize=(side, side))
    places = (
        nx.circular_layout(shown)
        if len(shown) < 4
        else nx.spring_layout(shown, seed=0, k=2 / len(shown) ** 0.5)
    )
    fill = [colours[labels.index(data["label"]) % len(colours)] for _, data in shown.nodes(data=True)]
    nx.draw_networkx_nodes(shown, places, node_color=fill, node_size=500, ax=axes)
    # "$" would begin a formula.
    texts = {node: _short(data["name"]) for node, data in shown.nodes(data=True)}
    nx.draw_networkx_labels(shown, places, texts, font_size=8, ax=axes)
    between: dict[tuple[str, str], list[str]] = {}
    for head, tail, label in shown.edges(keys=True):
        between.setdefault((head, tail), []).append(label)
    simple = nx.DiGraph(list(between))
    nx.draw_networkx_edges(simple, places, edge_color="#888888", node_size=500, ax=axes)
    captions = {ends: _short(", ".join(sorted(own))) for ends, own in between.items()}
    nx.draw_networkx_edge_labels(simple, places, captions, font_size=7, ax=axes)
    for label in labels:
        axes.scatter([], [], color=[colours[labels.index(label) % len(colours)]], label=_short(label))
    if labels:
        axes.legend(loc="upper left", fontsize=8)
    axes.set_axis_off()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _short(text: str, most: int = 32) -> str:
    text = _UNWRITABLE.sub("\ufffd", " ".join(text.split())).replace("$", r"\$")
    return text if len(text) <= most else text[: most - 1].rstrip("\\") + "…"
