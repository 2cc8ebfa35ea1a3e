#!/usr/bin/env bash
# The hashes of what two builds compute, of every weight type in both layouts: the bundled model and a synthetic one. Prints a table, and
# fails where a hash differs.
#
#     scripts/compare_logits.sh OLD NEW SYNTH    # two st-tool binaries, and the synth of either build (cargo build --release -p st-bench)
set -euo pipefail
old=$(realpath "$1") new=$(realpath "$2") synth=$(realpath "$3")
cd "$(dirname "$0")/.."
tiny=$PWD/models/tiny/checkpoint
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

ids=1,17,300,4,99,256,8,41,733,12,5,64
hash_of() { # binary, file
    "$1" logits "$2" --token-ids $ids -o "$folder/logits" -q >&2
    sha256sum "$folder/logits" | cut -c1-16
    rm "$folder/logits"
}

differ=0
echo "| model | type | layout | before | after |"
echo "|---|---|---|---|---|"
row() { # model, type, layout, file
    before=$(hash_of "$old" "$4") after=$(hash_of "$new" "$4")
    [ "$before" = "$after" ] || differ=1
    echo "| $1 | $2 | $3 | $before | $after |"
}

for type in q4_0 q8_0 f16 bf16 f32; do
    for layout in gguf offload; do
        "$new" quantize "$tiny" --$type --layout $layout -o "$folder/m.gguf" -q
        row bundled $type $layout "$folder/m.gguf"
        rm "$folder/m.gguf"
    done
done
for mix in q4_0 q4_0-imatrix q8_0 q4_k_s q4_k_m q5_k_m q6_k q3_k_m q2_k iq4_nl iq4_xs; do
    "$synth" make "$folder/s.gguf" --format gguf --mix $mix --layers 4 --hidden 512 --heads 4 --kv-heads 2 --experts 8 --active 2 \
        --ffn 256 --vocab 2000 >&2
    row synthetic $mix gguf "$folder/s.gguf"
    "$new" layout "$folder/s.gguf" "$folder/o.gguf" --to offload -q
    row synthetic $mix offload "$folder/o.gguf"
    rm "$folder"/*.gguf
done
exit $differ
