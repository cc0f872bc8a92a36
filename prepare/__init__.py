"""Text in, sealed token shards out: corpora, documents, tokenizers, parts, and the pool that builds them."""
