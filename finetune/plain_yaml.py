"""YAML of plain values, as users write it. Free of torch."""

import yaml


class PlainLoader(yaml.SafeLoader):
    """Refuses aliases of collections: nested, a few lines of them make billions of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        if alias and isinstance(self.anchors.get(alias.anchor), yaml.CollectionNode):
            raise yaml.YAMLError(f"the alias *{alias.anchor} stands for more than one value")
        return super().compose_node(parent, index)


def parse_yaml(text: str, loader: type[PlainLoader] = PlainLoader) -> object:
    """The value of a YAML document; raises ValueError, in one line, where it is none."""
    try:
        return loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
