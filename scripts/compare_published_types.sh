#!/usr/bin/env bash
# Files of every published mix of types, made by the real llama-quantize, run by st-tool and by llama.cpp, outside CI.
#
#   scripts/compare_published_types.sh ST_TOOL LLAMA_SRC LLAMA_BUILD F16.gguf FOLDER [TYPE...]
#
# F16.gguf is a file of floats with alignment 32 (what `st-tool quantize --f16` makes of a checkpoint); LLAMA_BUILD is
# llama.cpp's cmake folder with llama-quantize and libllama. Each TYPE (all published ones by default) is quantized into FOLDER, unless
# it is there; `TYPE-imatrix` uses the importance matrix that IMATRIX names, or one of random values. For each: ten prompts are continued greedily by both programs, and
# where they part the gap of llama.cpp's two best logits says whether it is a tie (check_llama_cpp.py); then st-tool answers once from
# memory, once within MEMORY (default: 4 MiB more than what it says is the least), and once from the offload layout: the same tokens, or it
# fails. FOLDER/table.md has a line for each. With DELETE=1 each file is removed when it was compared.
set -euo pipefail
[ $# -ge 5 ] || { sed -n '2,12p' "$0"; exit 2; }
tool=$1 source=$2 build=$3 floats=$4 folder=$5
shift 5
types=("$@")
[ ${#types[@]} -gt 0 ] || types=(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_S Q3_K_M Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ4_NL IQ4_XS)
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder"

# Ten prompts of ids that every vocabulary here has.
prompts=$folder/prompts.txt
python3 - >"$prompts" <<'PYTHON'
state = 12345
for length in (3, 5, 8, 12, 17, 23, 30, 38, 47, 57):
    ids = []
    for _ in range(length):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append(300 + (state >> 33) % 1500)
    print(",".join(map(str, ids)))
PYTHON

# An importance matrix of random values for the matrices of F16.gguf, as llama-imatrix wrote them at first.
random_matrix() {
    "$tool" inspect "$floats" --tensors | python3 -c '
import random, re, struct, sys
random.seed(1)
matrix = re.compile(r"(blk\.\d+\.(?:attn_(?:q|k|v|output)|ffn_(?:gate|up|down)_exps)\.weight) +\w+ +(\d+) x \d+(?: x (\d+))? ")
entries = [(m[1].encode(), int(m[2]) * int(m[3] or 1)) for m in map(matrix.match, sys.stdin) if m]
write = sys.stdout.buffer.write
write(struct.pack("i", len(entries)))
for name, n in entries:
    values = struct.pack(f"{n}f", *(random.random() ** 2 + 0.01 for _ in range(n)))
    write(struct.pack("i", len(name)) + name + struct.pack("ii", 1, n) + values)
' >"$folder/random.imatrix"
    echo "$folder/random.imatrix"
}

failed=0
table=$folder/table.md
[ -e "$table" ] || printf '%s\n' '| file | prompts that go on alike | tokens until they part, and gap of the two best logits there | least --memory, MiB | memory, budget and offload layout |' '|---|--:|---|--:|---|' >"$table"
for type in "${types[@]}"; do
    file=$folder/$type.gguf
    if [ ! -e "$file" ]; then
        matrix=()
        case $type in *-imatrix) matrix=(--imatrix "${IMATRIX:-$(random_matrix)}") ;; esac
        "$build/bin/llama-quantize" "${matrix[@]}" "$floats" "$file.part" "${type%-imatrix}" >"$folder/$type.log" 2>&1
        mv "$file.part" "$file"
    fi
    echo "== $type: $("$tool" inspect "$file" | grep -E '^ *(layers?|[A-Z0-9_]+  +[0-9]+ tensors)' | tr -s ' ' | tr '\n' ';')"
    compared=$folder/$type.txt
    python3 "$here/check_llama_cpp.py" --st-tool "$tool" --llama-src "$source" --llama-build "$build" "$file" \
        --prompts "$prompts" -n "${TOKENS:-32}" --threads "${THREADS:-2}" >"$compared" 2>&1 || failed=1
    cat "$compared"
    ids=$(sed -n 4p "$prompts")
    answer() { "$tool" run "$@" --token-ids "$ids" -n 24 --temp 0 --json --quiet | python3 -c 'import json, sys; print(json.load(sys.stdin)["ids"])'; }
    whole=$(answer "$file")
    least=$({ "$tool" run "$file" --token-ids "$ids" -n 1 --memory 1MiB 2>&1 || true; } | sed -n 's/.*needs at least \([0-9]*\).*/\1/p')
    memory=${MEMORY:-$((least + 4194304))}
    streamed=$(answer "$file" --memory "$memory")
    rm -f "$folder/offload.gguf"
    "$tool" layout "$file" "$folder/offload.gguf" --to offload --quiet
    packed=$(answer "$folder/offload.gguf" --memory "$memory")
    rm -f "$folder/offload.gguf"
    if [ "$whole" = "$streamed" ] && [ "$whole" = "$packed" ]; then
        same="the same tokens within $memory"
    else
        same="DIFFERENT: $whole / $streamed / $packed"
        failed=1
    fi
    echo "   $same"
    parted=$(sed -n 's/^prompt [0-9]*: .* tokens, \([0-9]*\) of .* logits are \([0-9.]*\) apart.*/\1: \2/p' "$compared" | paste -sd, | sed 's/,/, /g')
    printf '| %s | %s of %s | %s | %s | %s |\n' "$type" "$(grep -c 'tokens follow$' "$compared" || true)" "$(wc -l <"$prompts")" "$parted" \
        "$((least >> 20))" "$same" >>"$table"
    [ -z "${DELETE:-}" ] || rm -f "$file"
done
cat "$table"
exit $failed
