// Greedy continuations by llama.cpp, token ids in and token ids out; built and run by check_llama_cpp.py.
//
//   llama_greedy MODEL.gguf N_PREDICT N_THREADS < prompts
//
// Each line of stdin is a prompt of comma-separated token ids. For each, one line of stdout: the ids that llama.cpp
// continues with (at most N_PREDICT, ending after the first end-of-generation token), a semicolon, and for each the
// distance between the largest and the second largest logit.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL.gguf N_PREDICT N_THREADS < prompts\n", argv[0]);
        return 2;
    }
    const int n_predict = atoi(argv[2]);
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level >= GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_CONT) { fputs(text, stderr); }
    }, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) { return 1; }
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const int n_vocab = llama_vocab_n_tokens(vocab);

    for (std::string line; std::getline(std::cin, line);) {
        std::vector<llama_token> tokens;
        std::stringstream fields(line);
        for (std::string field; std::getline(fields, field, ',');) { tokens.push_back(atoi(field.c_str())); }
        if (tokens.empty()) { continue; }
        llama_context_params params = llama_context_default_params();
        params.n_ctx = tokens.size() + n_predict + 8;
        params.n_batch = tokens.size();
        params.n_threads = params.n_threads_batch = atoi(argv[3]);
        llama_context * ctx = llama_init_from_model(model, params);
        if (!ctx || llama_decode(ctx, llama_batch_get_one(tokens.data(), tokens.size()))) { return 1; }
        std::string ids, margins;
        for (int i = 0; i < n_predict; i++) {
            const float * logits = llama_get_logits_ith(ctx, -1);
            llama_token best = std::max_element(logits, logits + n_vocab) - logits;
            float second = -1e30f;
            for (int j = 0; j < n_vocab; j++) { if (j != best) { second = std::max(second, logits[j]); } }
            ids += (i ? "," : "") + std::to_string(best);
            margins += (i ? "," : "") + std::to_string(logits[best] - second);
            if (llama_vocab_is_eog(vocab, best)) { break; }
            if (i + 1 < n_predict && llama_decode(ctx, llama_batch_get_one(&best, 1))) { return 1; }
        }
        printf("%s;%s\n", ids.c_str(), margins.c_str());
        fflush(stdout);
        llama_free(ctx);
    }
    llama_model_free(model);
    return 0;
}
