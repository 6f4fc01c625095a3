// See lanes.h.
#include "lanes.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <stdexcept>

namespace dlrm {
namespace {

constexpr int64_t kOutboxBytes = 8 << 20;
constexpr int64_t kMostSlotBytes = 512 << 10;
constexpr uint32_t kSlots = 4;
constexpr int64_t kLine = 64;                   // bytes of a cache line
constexpr long kLookNanoseconds = 10'000'000;  // of sleep, until a rank looks whether the others are there

std::runtime_error system_error(const std::string& what) { return std::runtime_error(what + ": " + std::strerror(errno)); }

struct flock whole_file() {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  return lock;
}

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation, value, timeout, nullptr, 0);
}

// Calls body(bytes of the rows, where they are among `bytes` from `first` on, how many).
template <class Body>
void over_rows(const Rows& rows, int64_t first, int64_t bytes, Body body) {
  for (int64_t at = 0; at < bytes;) {
    const int64_t row = (first + at) / rows.bytes, inside = (first + at) % rows.bytes;
    const int64_t some = std::min(bytes - at, rows.bytes - inside);
    body(rows.at + row * rows.pitch + inside, at, some);
    at += some;
  }
}

void add_floats(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

}  // namespace

void copy(const Rows& from, const Rows& to) {
  over_rows(from, 0, from.size(), [&](const char* source, int64_t first, int64_t bytes) {
    over_rows(to, first, bytes, [&](char* target, int64_t at, int64_t some) { std::memcpy(target, source + at, some); });
  });
}

// What a slot belongs to: bytes of the whole part, and how many transfers were before.
struct Label {
  int64_t size;
  uint32_t transfer;
};

// A writer's and a reader's number of slots so far, which may overflow.
struct Lanes::Lane {
  alignas(kLine) std::atomic<uint32_t> written;
  alignas(kLine) std::atomic<uint32_t> read;
  alignas(kLine) Label labels[kSlots];
};

// What a rank's file begins with. Lanes and slots follow.
struct Lanes::Outbox {
  alignas(kLine) std::atomic<uint32_t> bell;  // rung whenever another rank has written or read for this one
  std::atomic<uint32_t> is_asleep, has_left;
  int64_t token;
};

Lanes::Lanes(int rank, int world)
    : rank_(rank),
      world_(world),
      slot_bytes_(std::min(kMostSlotBytes, kOutboxBytes / kSlots / std::max(1, world - 1)) / kLine * kLine),
      outbox_bytes_(sizeof(Outbox) + world * (sizeof(Lane) + kSlots * slot_bytes_)),
      files_(world, -1),
      outboxes_(world, nullptr) {
  const int file = memfd_create("dlrm", MFD_CLOEXEC);
  if (file < 0) throw system_error("memfd_create");
  files_[rank] = file;
  // Allocated now: later there would be a SIGBUS in place of an error. The lock, which forked processes do not have, is this
  // rank's sign of life.
  struct flock lock = whole_file();
  if (ftruncate(file, outbox_bytes_) != 0 || fallocate(file, 0, 0, outbox_bytes_) != 0 || fcntl(file, F_SETLK, &lock) != 0) {
    const auto error = system_error("an outbox of " + std::to_string(outbox_bytes_) + " bytes");
    close(file);
    throw error;
  }
  try {
    outboxes_[rank] = map(file);
    if (getrandom(&outboxes_[rank]->token, sizeof(int64_t), 0) != sizeof(int64_t)) throw system_error("getrandom");
  } catch (...) {
    if (outboxes_[rank] != nullptr) munmap(outboxes_[rank], outbox_bytes_);
    close(file);
    throw;
  }
}

Lanes::~Lanes() {
  for (Outbox* outbox : outboxes_) {
    if (outbox != nullptr) munmap(outbox, outbox_bytes_);
  }
  for (int file : files_) {
    if (file >= 0) close(file);
  }
}

Lanes::Address Lanes::address() const { return {getpid(), files_[rank_], outboxes_[rank_]->token}; }

Lanes::Outbox* Lanes::map(int file) {
  void* memory = mmap(nullptr, outbox_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) throw system_error("mmap");
  return static_cast<Outbox*>(memory);
}

void Lanes::open(const std::vector<Address>& addresses) {
  for (int rank = 0; rank < world_; ++rank) {
    if (rank == rank_) continue;
    const auto& [process, file, token] = addresses[rank];
    if (file < 0) throw std::runtime_error("another rank can't");
    const std::string path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(file);
    files_[rank] = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (files_[rank] < 0) throw system_error(path);
    if (lseek(files_[rank], 0, SEEK_END) == outbox_bytes_) outboxes_[rank] = map(files_[rank]);
    if (outboxes_[rank] == nullptr || outboxes_[rank]->token != token) {
      throw std::runtime_error(path + " is another process's: ranks have process numbers of their own");
    }
  }
}

Lanes::Lane& Lanes::lane(int from, int to) const {
  return reinterpret_cast<Lane*>(outboxes_[from] + 1)[to];
}

char* Lanes::slot(int from, int to, uint32_t number) const {
  char* slots = reinterpret_cast<char*>(reinterpret_cast<Lane*>(outboxes_[from] + 1) + world_);
  return slots + (to * kSlots + number % kSlots) * slot_bytes_;
}

void Lanes::transfer(std::vector<Part> outgoing, std::vector<Part> incoming) {
  const auto is_done = [](const Part& part) { return part.is_done; };
  for (;;) {
    const uint32_t bell = outboxes_[rank_]->bell.load();
    bool has_moved = false;
    for (Part& part : outgoing) has_moved |= !part.is_done && send(part);
    bool adds = true;  // no sum that comes later before one that comes earlier
    for (Part& part : incoming) {
      if (part.is_done || (part.adds && !adds)) continue;
      has_moved |= receive(part);
      adds &= !part.adds || part.is_done;
    }
    if (std::all_of(outgoing.begin(), outgoing.end(), is_done) && std::all_of(incoming.begin(), incoming.end(), is_done)) {
      ++transfers_;
      return;
    }
    if (has_moved || sleep(bell)) continue;
    for (const auto* parts : {&outgoing, &incoming}) {
      for (const Part& part : *parts) {
        // What a rank wrote before its end is there by now, so that the bell would have rung.
        if (!part.is_done && outboxes_[rank_]->bell.load() == bell) check_present(part.rank);
      }
    }
  }
}

void Lanes::leave() {
  outboxes_[rank_]->has_left = 1;
  for (int rank = 0; rank < world_; ++rank) {
    if (outboxes_[rank] != nullptr) wake(rank);
  }
}

// One slot at a time, so that all lanes are kept busy. Whether there was room.
bool Lanes::send(Part& part) {
  Lane& to = lane(rank_, part.rank);
  const uint32_t number = to.written.load(std::memory_order_relaxed);
  if (number - to.read.load(std::memory_order_acquire) == kSlots) return false;
  const int64_t size = part.rows.size(), bytes = std::min(slot_bytes_, size - part.done);
  char* target = slot(rank_, part.rank, number);
  to.labels[number % kSlots] = {size, transfers_};
  over_rows(part.rows, part.done, bytes,
            [&](const char* source, int64_t at, int64_t some) { std::memcpy(target + at, source, some); });
  part.done += bytes;
  part.is_done = part.done == size;
  to.written.store(number + 1, std::memory_order_release);
  wake(part.rank);
  return true;
}

// Likewise. Whether there was something.
bool Lanes::receive(Part& part) {
  Lane& from = lane(part.rank, rank_);
  const uint32_t number = from.read.load(std::memory_order_relaxed);
  if (number == from.written.load(std::memory_order_acquire)) return false;
  const int64_t size = part.rows.size(), bytes = std::min(slot_bytes_, size - part.done);
  if (const Label sent = from.labels[number % kSlots]; sent.size != size || sent.transfer != transfers_) {
    throw std::runtime_error("rank " + std::to_string(part.rank) + " sent " + std::to_string(sent.size) + " bytes, expected " +
                             std::to_string(size) + ". Ranks must exchange the same things in the same order.");
  }
  const char* source = slot(part.rank, rank_, number);
  over_rows(part.rows, part.done, bytes, [&](char* target, int64_t at, int64_t some) {
    if (part.adds) {
      add_floats(reinterpret_cast<float*>(target), reinterpret_cast<const float*>(source + at), some / sizeof(float));
    } else {
      std::memcpy(target, source + at, some);
    }
  });
  part.done += bytes;
  part.is_done = part.done == size;
  from.read.store(number + 1, std::memory_order_release);
  wake(part.rank);
  return true;
}

void Lanes::wake(int rank) {
  Outbox& outbox = *outboxes_[rank];
  outbox.bell.fetch_add(1);
  if (outbox.is_asleep.exchange(0) != 0) futex(&outbox.bell, FUTEX_WAKE, 1, nullptr);
}

// Until the bell is another one than it was: true, or it is time to look for the others: false.
bool Lanes::sleep(uint32_t bell) {
  Outbox& own = *outboxes_[rank_];
  if (own.has_left) throw std::runtime_error("the group was shut down");
  own.is_asleep = 1;
  const timespec timeout{0, kLookNanoseconds};
  const bool has_rung = futex(&own.bell, FUTEX_WAIT, bell, &timeout) == 0 || errno != ETIMEDOUT;
  own.is_asleep = 0;
  return has_rung;
}

// Its lock is free if it has ended.
void Lanes::check_present(int rank) const {
  struct flock lock = whole_file();
  const bool has_ended = fcntl(files_[rank], F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
  if (!has_ended && outboxes_[rank]->has_left == 0) return;
  throw std::runtime_error("rank " + std::to_string(rank) + (has_ended ? " has ended" : " has left the group"));
}

}  // namespace dlrm
