"""How much an untrusted file may ask of us. Every cap is checked before the memory it guards is allocated."""

# safetensors itself allows this much header, so no valid file is refused.
HEADER_BYTES_MAX = 100_000_000
# config.json, the shard index, our own manifest.
JSON_BYTES_MAX = 64 * 2**20
JSON_DEPTH_MAX = 64
# tokenizer_config.json holds int(1e30), 31 digits; nothing honest is near 64.
JSON_INT_DIGITS_MAX = 64
TENSORS_MAX = 1_000_000
SHARDS_MAX = 100_000
RANK_MAX = 8
TENSOR_NAME_BYTES_MAX = 512
# A header entry has one object and two lists; the rest is room for metadata.
JSON_CONTAINERS_MAX = 3 * TENSORS_MAX + 64
# Marks are , : " [ and {. A header entry of rank 2 has 22 of them, of rank 8 has 28.
JSON_MARKS_MAX = 32 * TENSORS_MAX
# torch and C readers count elements in signed 64-bit integers.
ELEMENTS_MAX = 2**63 - 1
# How many offenders one message names before it says "and N more".
NAMED_IN_MESSAGE_MAX = 5
# Words of a command line that is gone on with.
COMMAND_WORDS_MAX = 1000
# Tokenizers of 260,000 tokens take 35 MB.
COMPANION_BYTES_MAX = 512 * 2**20
