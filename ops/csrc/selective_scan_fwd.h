// The selective scan's forward: one unit is a group of documents times a block of channels.
#pragma once

#include "selective_scan.h"

namespace packc {

struct ForwardOutputs {
  Tensor out; // (B, L, D)
  Tensor final_state; // (documents, D, N), or (0, D, N) where it is not wanted
  Tensor chunk_states; // see kept_state
};

class Forward {
 public:
  Forward(const Problem& p, const ChannelBlock& block, const ForwardOutputs& outputs)
      : p_(p), block_(block), outputs_(outputs), in_(p, block), state_(p.N), result_(kChunk * kChannels) {}

  void run(const Group& group) {
    for (const Piece& piece : group) {
      in_.load_piece(piece, [](int64_t, int64_t, Vec) {});
      skip_connection(piece);
      for (int64_t v = 0; v < block_.vectors(); ++v)
        for (int64_t n = 0; n < in_.states; n += kStates)
          scan(piece, v, n);
      gate_and_store(piece);
    }
  }

 private:
  void skip_connection(const Piece& piece) {
    for (int64_t v = 0; v < block_.vectors(); ++v) {
      const Vec D = in_.parameter(p_.D, v);
      for (int64_t t = 0; t < piece.count; ++t)
        (p_.D ? D * Vec::loadu(in_.u.at(v, t)) : D).store(y_.at(v, t));
    }
  }

  void scan(const Piece& piece, int64_t v, int64_t n) {
    Registers h, A;
    for (int64_t i = 0; i < kStates; ++i) {
      h[i] = Vec::loadu(state_.at(v, n + i));
      A[i] = Vec::loadu(in_.A.at(v, n + i));
    }
    for (const Run& run : piece.runs) {
      if (run.starts)
        in_.begin_document(run.document, v, n, h);
      if (run.begin == 0 && piece.begins_chunk())
        keep_chunk_state(piece, v, n, h);
      scan_tokens(run, v, n, A, h);
      if (run.ends && outputs_.final_state.size(0))
        end_document(run.document, v, n, h);
    }
    for (int64_t i = 0; i < kStates; ++i)
      h[i].store(state_.at(v, n + i));
  }

  void scan_tokens(const Run& run, int64_t v, int64_t n, const Registers& A, Registers& states) {
    const float* delta = in_.delta.at(v, 0);
    const float* x = in_.x.at(v, 0);
    const float* B = in_.B.data() + n;
    const float* C = in_.C.data() + n;
    float* out = y_.at(v, 0);
    Registers h = states;
    for (int64_t t = run.begin; t < run.end; ++t) {
      const Vec delta_t = Vec::loadu(delta + t * kVec), x_t = Vec::loadu(x + t * kVec);
      Vec y = Vec::loadu(out + t * kVec);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kStates; ++i) {
        h[i] = at::vec::fmadd(exp2(delta_t * A[i]), h[i], x_t * Vec(B[t * in_.states + i]));
        y = at::vec::fmadd(h[i], Vec(C[t * in_.states + i]), y);
      }
      y.store(out + t * kVec);
    }
    states = h;
  }

  void keep_chunk_state(const Piece& piece, int64_t v, int64_t n, const Registers& h) {
    float* kept = outputs_.chunk_states.mutable_data_ptr<float>();
    for (int64_t i = 0; i < kStates && n + i < p_.N; ++i)
      h[i].store(kept + kept_state(p_, piece, n + i, block_.first + v * kVec), block_.lanes(v));
  }

  void end_document(int64_t document, int64_t v, int64_t n, const Registers& h) {
    float* matrix = outputs_.final_state.mutable_data_ptr<float>() +
        (document * p_.channels + block_.first + v * kVec) * p_.N;
    for (int64_t i = 0; i < kStates; ++i)
      scatter_state(h[i], matrix, p_.N, n + i, block_.lanes(v));
  }

  void gate_and_store(const Piece& piece) {
    if (p_.z)
      in_.load_rows(*p_.z, piece);
    for (int64_t v = 0; v < block_.vectors(); ++v) {
      for (int64_t t = 0; t < piece.count; ++t) {
        Vec y = Vec::loadu(y_.at(v, t));
        if (p_.z) {
          const Vec z = in_.row(v, t);
          y = y * (z * accurate_sigmoid(z));
        }
        y.store(result_.data() + t * kChannels + v * kVec);
      }
    }
    store(
        result_.data(), kChannels, outputs_.out, piece.row, piece.first, block_.first, piece.count, block_.count);
  }

  const Problem& p_;
  const ChannelBlock& block_;
  const ForwardOutputs& outputs_;
  Inputs in_;
  States state_; // after the piece before
  Tile y_;
  Scratch result_;
};

} // namespace packc
