from fla.ops.kda.chunk import chunk_kda as chunk_kda
