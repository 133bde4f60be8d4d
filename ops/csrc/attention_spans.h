// Which queries meet which keys: stretches of queries of a packed row, each with a stretch of keys. Of a document the two
// are one; of a document that is cut there are more keys than queries; of two sequences they lie in two rows.
#pragma once

#include <limits>

#include "chunks.h"

namespace packc {

// Numbers from begin to end.
struct Range {
  int64_t begin, end;

  bool empty() const {
    return begin >= end;
  }
};

// A query sees the keys that lie between `least` and `most` tokens before it: behind it, if negative.
struct Seen {
  int64_t least, most;

  Seen(bool causal, std::optional<int64_t> window) {
    most = window ? *window - 1 : std::numeric_limits<int64_t>::max() / 4;
    least = causal ? 0 : -most;
  }
};

class Spans {
 public:
  Chunks queries; // a document of these is a span
  bool all_queries = true, all_keys = true; // whether each is in a span

  explicit Spans(const Documents& documents) : queries(documents) {}

  // spans (S, 5): queries from, to, keys from, to, and at which key query 0 is.
  Spans(const at::Tensor& spans, int64_t T_q, int64_t T_k) : keys_(Chunks()) {
    TORCH_CHECK_VALUE(spans.dim() == 2 && spans.size(1) == 5, "spans must be (S, 5), not ", spans.sizes());
    const at::Tensor numbers = spans.to(at::kLong).contiguous();
    const int64_t* span = numbers.const_data_ptr<int64_t>();
    int64_t queries_end = 0, keys_end = 0, of_queries = 0, of_keys = 0;
    for (int64_t n = 0; n < spans.size(0); ++n, span += 5) {
      of_queries += add(queries, span[0], span[1], T_q, queries_end);
      of_keys += add(*keys_, span[2], span[3], T_k, keys_end);
      shifts_.push_back(span[4]);
    }
    all_queries = of_queries == T_q;
    all_keys = of_keys == T_k;
  }

  const Chunks& keys() const {
    return keys_ ? *keys_ : queries;
  }
  // Where the first query of a chunk is among the row of keys.
  int64_t place(const Chunk& of_queries) const {
    return of_queries.begin + (keys_ ? shifts_[of_queries.document] : 0);
  }
  // The keys of a span.
  Range keys_of(int64_t span) const {
    const Chunks& all = keys();
    const int64_t first = all.of[span], end = all.of[span + 1];
    if (first == end)
      return {0, 0};
    return {all.all[first].begin, all.all[end - 1].begin + all.all[end - 1].length};
  }
  // Of the chunks of keys those with one that a query of chunk c sees.
  Range chunks_of_keys(const Seen& seen, int64_t c) const {
    const Chunk& of_queries = queries.all[c];
    const int64_t first = keys().of[of_queries.document], end = keys().of[of_queries.document + 1];
    const int64_t begin = place(of_queries) - keys_of(of_queries.document).begin;
    const int64_t from = std::max<int64_t>(begin - seen.most, 0), last = begin + of_queries.length - 1 - seen.least;
    return last < 0 ? Range{first, first} : Range{first + from / kChunk, std::min(first + last / kChunk + 1, end)};
  }
  // Whether query i of a chunk sees any key.
  bool sees_any(const Seen& seen, const Chunk& of_queries, int64_t i) const {
    const Range keys = keys_of(of_queries.document);
    const int64_t at = place(of_queries) + i;
    return std::max(at - seen.most, keys.begin) < std::min(at - seen.least + 1, keys.end);
  }

 private:
  std::optional<Chunks> keys_; // of spans of their own, not of documents
  std::vector<int64_t> shifts_;

  // Stretches rise, but empty ones: nobody's results are written twice.
  static int64_t add(Chunks& chunks, int64_t begin, int64_t end, int64_t T, int64_t& before) {
    TORCH_CHECK_VALUE(
        begin == end || (before <= begin && begin < end && end <= T), "spans must rise, one behind the other, up to ", T,
        "; got ", begin, " to ", end, " behind ", before);
    if (begin < end)
      before = end;
    chunks.add(0, begin, end - begin);
    return end - begin;
  }
};

} // namespace packc
