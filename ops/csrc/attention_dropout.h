// Which weights of attention are dropped: a function of the seed and of where a weight is, by the counter-based generator
// Philox 4x32-10 (Salmon et al., SC 2011), so that the backward, and whoever computes it again, finds the same.
// ops/varlen_attention/dropout.py is the specification.
#pragma once

#include "varlen_attention.h"

namespace packc {

struct Dropout {
  uint32_t key[2] = {0, 0};
  uint32_t threshold = 0; // words below it drop
  float kept = 1; // the factor of what is kept

  Dropout(double p, const std::optional<at::Tensor>& seed) {
    if (p == 0)
      return;
    TORCH_CHECK_VALUE(seed && seed->numel() == 1 && seed->scalar_type() == at::kLong, "seed must be one int64 number");
    const auto bits = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
    key[0] = static_cast<uint32_t>(bits);
    key[1] = static_cast<uint32_t>(bits >> 32);
    threshold = static_cast<uint32_t>(std::min(p * 4294967296., 4294967295.));
    kept = p < 1 ? static_cast<float>(1 / (1 - p)) : 0.f;
  }
  explicit operator bool() const {
    return threshold != 0;
  }

  // tile[key][query] of a chunk of queries and one of keys, where somebody sees somebody: `kept`, or 0.
  void factors(const Pair& pair, const Spans& spans, int64_t of_queries, int64_t of_keys, int64_t head, float* tile) const {
    const int64_t document = spans.queries.all[of_queries].document;
    const int64_t query = (of_queries - spans.queries.of[document]) * kChunk;
    const int64_t key = (of_keys - spans.keys().of[document]) * kChunk;
    pair.for_bands_of_rows([&](Range band, Range seeing) {
      for (int64_t j = band.begin; j < band.end; j += kWords)
        for (int64_t i = seeing.begin; i < seeing.end; i += kVec)
          block(document, head, query + i, (key + j) / kWords, tile + j * kChunk + i);
    });
  }

 private:
  static constexpr int64_t kWords = 4; // of a counter: of so many keys, one behind the other

  // Of kVec queries and kWords keys. Words are 32 bits in 64, so that products need no conversion.
  void block(int64_t document, int64_t head, int64_t query, int64_t keys, float* tile) const {
    uint64_t words[kWords][kVec];
    for (int64_t lane = 0; lane < kVec; ++lane) {
      words[0][lane] = static_cast<uint32_t>(query + lane);
      words[1][lane] = static_cast<uint32_t>(keys);
      words[2][lane] = static_cast<uint32_t>(head);
      words[3][lane] = static_cast<uint32_t>(document);
    }
    uint32_t low = key[0], high = key[1];
    for (int round = 0; round < 10; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u) {
#pragma omp simd
      for (int64_t lane = 0; lane < kVec; ++lane) {
        const uint64_t a = words[0][lane] * 0xD2511F53u, b = words[2][lane] * 0xCD9E8D57u;
        words[0][lane] = (b >> 32) ^ words[1][lane] ^ low;
        words[1][lane] = static_cast<uint32_t>(b);
        words[2][lane] = (a >> 32) ^ words[3][lane] ^ high;
        words[3][lane] = static_cast<uint32_t>(a);
      }
    }
    for (int64_t word = 0; word < kWords; ++word)
#pragma omp simd
      for (int64_t lane = 0; lane < kVec; ++lane)
        tile[word * kChunk + lane] = words[word][lane] < threshold ? 0.f : kept;
  }
};

} // namespace packc
