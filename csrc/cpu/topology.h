// The machine's cores and caches, as Linux describes them under /sys.
#pragma once

#include <string>
#include <vector>

#include "plan.h"

namespace lstm_fused {

// Of the CPUs `cpus`, from the files below `root`; empty: "/". What is missing keeps its default.
Topology read_topology(const std::string& root, const std::vector<int>& cpus);

// This process's, read once.
const Topology& topology();

// CPUs of the machine on which nothing runs now, the caller's own counted among them; as many as an
// int holds where that is not known.
int idle_cpus(const std::string& root);

// The CPUs this process may run on; empty where that is not known.
std::vector<int> allowed_cpus();

}  // namespace lstm_fused
