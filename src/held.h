#ifndef CREDIT_LEASE_HELD_H
#define CREDIT_LEASE_HELD_H

extern void held_note(const text *account);
extern bool held_now(const text *account);
extern bool held_ever(const text *account);
extern bool held_is_waited_for(void);

#endif							/* CREDIT_LEASE_HELD_H */
