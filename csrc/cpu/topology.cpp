#include "topology.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <fstream>
#include <limits>
#include <map>
#include <sstream>

namespace lstm_fused {
namespace {

// A file's first line, empty where there is none.
std::string line_of(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "32K", "16M", or plain bytes; 0 where there is no number.
int64_t number_in(const std::string& text) {
  std::istringstream in(text);
  int64_t value = 0;
  char unit = 0;
  in >> value >> unit;
  return value << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0);
}

// "0-3,8" as its numbers.
std::vector<int> list_in(const std::string& text) {
  std::vector<int> all;
  std::istringstream ranges(text);
  for (std::string range; std::getline(ranges, range, ',');) {
    int first = 0, last = 0;
    char dash = 0;
    std::istringstream in(range);
    if (!(in >> first)) continue;
    if (!(in >> dash >> last)) last = first;
    for (int i = first; i <= last; ++i) all.push_back(i);
  }
  return all;
}

// How many of `cores` are in a list.
int count_in(const std::vector<int>& cores, const std::vector<int>& list) {
  return static_cast<int>(std::count_if(cores.begin(), cores.end(), [&](int core) {
    return std::find(list.begin(), list.end(), core) != list.end();
  }));
}

// One CPU of each core: those of a core share its multiply-add units, so that a second thread there
// gains nothing.
std::vector<int> cores_of(const std::string& base, const std::vector<int>& cpus) {
  std::vector<int> cores, seen;
  for (const int cpu : cpus) {
    const std::vector<int> siblings =
        list_in(line_of(base + std::to_string(cpu) + "/topology/thread_siblings_list"));
    const int first = siblings.empty() ? cpu : siblings[0];
    if (std::find(seen.begin(), seen.end(), first) != seen.end()) continue;
    seen.push_back(first);
    cores.push_back(cpu);
  }
  return cores;
}

void read_caches(const std::string& base, const std::vector<int>& cores, Topology& t) {
  int64_t last = 0;
  for (int index = 0; index < 8; ++index) {
    const std::string cache =
        base + std::to_string(cores[0]) + "/cache/index" + std::to_string(index) + "/";
    const int64_t level = number_in(line_of(cache + "level"));
    const int64_t bytes = number_in(line_of(cache + "size"));
    if (level < 2 || bytes == 0 || line_of(cache + "type") == "Instruction") continue;
    const int sharing = count_in(cores, list_in(line_of(cache + "shared_cpu_list")));
    if (level == 2) t.l2 = bytes / std::max(1, sharing);
    if (level < last) continue;
    last = level;
    t.l3 = bytes;
    t.cache_cores = std::max(1, sharing);
  }
}

// The CPUs' worth of time the process's cgroup and those above it grant; 0: no limit.
double quota(const std::string& root) {
  double least = 0;
  const auto limit = [&](double time, double period) {
    if (time > 0 && period > 0 && (least == 0 || time / period < least)) least = time / period;
  };
  const auto read = [&](const std::string& folder) {
    std::istringstream v2(line_of(folder + "/cpu.max"));
    double time = 0, period = 0;
    if (v2 >> time >> period) limit(time, period);  // "max" is no number: no limit
    limit(static_cast<double>(number_in(line_of(folder + "/cpu.cfs_quota_us"))),
          static_cast<double>(number_in(line_of(folder + "/cpu.cfs_period_us"))));
  };
  std::ifstream groups(root + "/proc/self/cgroup");
  const std::string mount = root + "/sys/fs/cgroup";
  for (const char* folder : {"", "/cpu", "/cpu,cpuacct"}) read(mount + folder);
  for (std::string group; std::getline(groups, group);) {  // hierarchy:controllers:path
    const size_t first = group.find(':'), second = group.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = group.substr(first + 1, second - first - 1);
    if (!controllers.empty() && controllers.find("cpu") == std::string::npos) continue;
    const std::string folder = mount + (controllers.empty() ? "" : "/" + controllers);
    for (std::string path = group.substr(second + 1); path.size() > 1; path.resize(path.rfind('/')))
      read(folder + path);
  }
  return least;
}

}  // namespace

Topology read_topology(const std::string& root, const std::vector<int>& cpus) {
  Topology t;
  if (cpus.empty()) return t;
  const std::string base = root + "/sys/devices/system/cpu/cpu";
  const std::vector<int> cores = cores_of(base, cpus);
  t.cores = static_cast<int>(cores.size());
  read_caches(base, cores, t);
  std::map<std::string, int> sockets;
  for (const int core : cores)
    ++sockets[line_of(base + std::to_string(core) + "/topology/physical_package_id")];
  t.socket_cores = 0;
  for (const auto& [socket, count] : sockets) t.socket_cores = std::max(t.socket_cores, count);
  const int64_t khz =
      number_in(line_of(base + std::to_string(cores[0]) + "/cpufreq/cpuinfo_max_freq"));
  if (khz > 0) t.mhz = khz / 1000;
  if (const double granted = quota(root); granted > 0)
    t.cores = std::clamp(static_cast<int>(granted), 1, t.cores);
  return t;
}

int idle_cpus(const std::string& root) {
  // "0.20 0.18 0.12 1/80 11206": 1 of 80 tasks is running or ready.
  std::istringstream load(line_of(root + "/proc/loadavg"));
  std::string averages[3];
  int running = 0;
  const int online =
      static_cast<int>(list_in(line_of(root + "/sys/devices/system/cpu/online")).size());
  if (!(load >> averages[0] >> averages[1] >> averages[2] >> running) || online == 0)
    return std::numeric_limits<int>::max();
  return online - (running - 1);
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
#endif
  return cpus;
}

const Topology& topology() {
  static const Topology known = read_topology("", allowed_cpus());
  return known;
}

}  // namespace lstm_fused
