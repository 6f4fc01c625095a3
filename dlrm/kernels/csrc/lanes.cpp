// See lanes.h.
#include "lanes.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <string>

namespace dlrm {
namespace {

constexpr int64_t kOutboxBytes = 8 << 20;
constexpr int64_t kMostSlotBytes = 512 << 10;
constexpr uint32_t kSlots = 4;
constexpr long kLookNanoseconds = 10'000'000;  // of sleep, before a rank looks whether the others are alive

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, timeout, nullptr, 0);
}

void add_floats(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

}  // namespace

// What a slot belongs to, by which ranks find that they disagree: the bytes of the whole part, and the number of
// transfers before this one.
struct Label {
  int64_t size;
  uint32_t transfer;
};

// How many slots were written and read so far, modulo 2^32.
struct Lanes::Lane {
  alignas(kLine) std::atomic<uint32_t> written;
  alignas(kLine) std::atomic<uint32_t> read;
  alignas(kLine) Label labels[kSlots];
};

// The beginning of a rank's memory. Its lanes follow, then their slots.
struct Lanes::Outbox {
  alignas(kLine) std::atomic<uint32_t> bell;  // one more whenever another rank has written to or read from this one
  std::atomic<uint32_t> is_asleep, has_left;
};

Lanes::Lanes(int rank, int world)
    : rank_(rank),
      world_(world),
      slot_bytes_(std::min(kMostSlotBytes, kOutboxBytes / kSlots / std::max(1, world - 1)) / kLine * kLine),
      memory_(rank, world, sizeof(Outbox) + world * (sizeof(Lane) + kSlots * slot_bytes_)) {}

Lanes::Outbox& Lanes::outbox(int rank) const { return *reinterpret_cast<Outbox*>(memory_.of(rank)); }

Lanes::Lane& Lanes::lane(int from, int to) const {
  return reinterpret_cast<Lane*>(memory_.of(from) + sizeof(Outbox))[to];
}

char* Lanes::slot(int from, int to, uint32_t number) const {
  char* slots = memory_.of(from) + sizeof(Outbox) + world_ * sizeof(Lane);
  return slots + (to * kSlots + number % kSlots) * slot_bytes_;
}

void Lanes::transfer(std::vector<Part> outgoing, std::vector<Part> incoming) {
  const auto is_done = [](const Part& part) { return part.is_done; };
  for (;;) {
    const uint32_t bell = outbox(rank_).bell.load();
    bool has_moved = false;
    for (Part& part : outgoing) has_moved |= !part.is_done && send(part);
    bool adds = true;  // while all earlier parts are added: sums are made in the order of the parts
    for (Part& part : incoming) {
      if (part.is_done || (part.adds && !adds)) continue;
      has_moved |= receive(part);
      adds &= !part.adds || part.is_done;
    }
    if (std::all_of(outgoing.begin(), outgoing.end(), is_done) &&
        std::all_of(incoming.begin(), incoming.end(), is_done)) {
      ++transfers_;
      return;
    }
    if (has_moved || sleep(bell)) continue;
    for (const auto* parts : {&outgoing, &incoming}) {
      for (const Part& part : *parts) {
        // If a rank wrote before it exited, the bell has rung: read that first.
        if (!part.is_done && outbox(rank_).bell.load() == bell) check_present(part.rank);
      }
    }
  }
}

void Lanes::leave() {
  outbox(rank_).has_left = 1;
  for (int rank = 0; rank < world_; ++rank) {
    if (memory_.of(rank) != nullptr) wake(rank);
  }
}

// Writes one slot of `part`, so that all lanes get their turn. Returns whether there was room.
bool Lanes::send(Part& part) {
  Lane& to = lane(rank_, part.rank);
  const uint32_t number = to.written.load(std::memory_order_relaxed);
  if (number - to.read.load(std::memory_order_acquire) == kSlots) return false;
  const int64_t size = part.bytes.size, bytes = std::min(slot_bytes_, size - part.done);
  to.labels[number % kSlots] = {size, transfers_};
  if (bytes > 0) std::memcpy(slot(rank_, part.rank, number), part.bytes.at + part.done, bytes);
  part.done += bytes;
  part.is_done = part.done == size;
  to.written.store(number + 1, std::memory_order_release);
  wake(part.rank);
  return true;
}

// Reads one slot of `part`. Returns whether there was one.
bool Lanes::receive(Part& part) {
  Lane& from = lane(part.rank, rank_);
  const uint32_t number = from.read.load(std::memory_order_relaxed);
  if (number == from.written.load(std::memory_order_acquire)) return false;
  const int64_t size = part.bytes.size, bytes = std::min(slot_bytes_, size - part.done);
  if (const Label sent = from.labels[number % kSlots]; sent.size != size || sent.transfer != transfers_) {
    throw std::runtime_error("rank " + std::to_string(part.rank) + " sent " + std::to_string(sent.size) +
                             " bytes, expected " + std::to_string(size) +
                             ". Ranks must exchange the same things in the same order.");
  }
  const char* source = slot(part.rank, rank_, number);
  char* target = part.bytes.at + part.done;
  if (part.adds) {
    add_floats(reinterpret_cast<float*>(target), reinterpret_cast<const float*>(source), bytes / sizeof(float));
  } else if (bytes > 0) {
    std::memcpy(target, source, bytes);
  }
  part.done += bytes;
  part.is_done = part.done == size;
  from.read.store(number + 1, std::memory_order_release);
  wake(part.rank);
  return true;
}

void Lanes::wake(int rank) {
  Outbox& other = outbox(rank);
  other.bell.fetch_add(1);
  if (other.is_asleep.exchange(0) != 0) futex(&other.bell, FUTEX_WAKE, 1, nullptr);
}

// Sleeps until the bell differs from `bell` (returns true), or until it is time to look for the others (false).
bool Lanes::sleep(uint32_t bell) {
  Outbox& own = outbox(rank_);
  if (own.has_left) throw std::runtime_error("the group was shut down");
  own.is_asleep = 1;
  const timespec timeout{0, kLookNanoseconds};
  const bool has_rung = futex(&own.bell, FUTEX_WAIT, bell, &timeout) == 0 || errno != ETIMEDOUT;
  own.is_asleep = 0;
  return has_rung;
}

void Lanes::check_present(int rank) const {
  const bool has_ended = memory_.has_ended(rank);
  if (!has_ended && outbox(rank).has_left == 0) return;
  throw std::runtime_error("rank " + std::to_string(rank) + (has_ended ? " has ended" : " has left the group"));
}

}  // namespace dlrm
