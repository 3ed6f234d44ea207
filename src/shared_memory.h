#ifndef CREDIT_LEASE_SHARED_MEMORY_H
#define CREDIT_LEASE_SHARED_MEMORY_H

#include "storage/lwlock.h"

extern void shared_memory_request(const char *name, Size (*size) (void),
								  void **memory, LWLock **lock);
extern void shared_memory_keep_text(char *to, Size size, const char *from);

#endif							/* CREDIT_LEASE_SHARED_MEMORY_H */
