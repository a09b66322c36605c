package dek

import "errors"

// The error classes of Keyward. A class answers one question: what may the
// caller do? Every error that crosses a package wraps at most one of them;
// callers use errors.Is and never match text. The wire carries the class only.
var (
	// ErrAuth is returned when sealed data is not ours, not for this place, or
	// damaged: one answer for every cause, so that it is no oracle. Do not retry.
	ErrAuth = errors.New("not authentic")
	// ErrDenied is returned when the key service knows the caller and says no
	// (no rule, disabled key, revoked identity). It is never an outage: drop
	// what was cached for the object.
	ErrDenied = errors.New("denied")
	// ErrUnavailable is returned when nothing is known about the outcome
	// (unreachable, timed out, device gone). Retry with back-off; keep serving
	// what is held.
	ErrUnavailable = errors.New("unavailable")
	// ErrNotFound is returned when the named object does not exist. Strangers
	// get ErrDenied instead, so that names can't be probed.
	ErrNotFound = errors.New("not found")
	// ErrExists is returned when a name or version is taken, also by a
	// soft-deleted object. Choose another name.
	ErrExists = errors.New("already exists")
	// ErrConflict is returned when another writer was faster (compare-and-swap
	// lost). Read again and retry.
	ErrConflict = errors.New("changed meanwhile")
	// ErrInvalid is returned for malformed input; the text names the field and
	// the remedy. Do not retry unchanged.
	ErrInvalid = errors.New("invalid")
	// ErrPrecondition is returned when the state forbids the act (still needed,
	// wrong state, not initialised); the text says what must happen first.
	ErrPrecondition = errors.New("precondition failed")
	// ErrExhausted is returned when a limit is reached (quota, seals per key,
	// disk). Free the resource, then retry.
	ErrExhausted = errors.New("exhausted")
	// ErrCorrupt is returned when stored state is damaged or rolled back. Stop
	// and follow the text; nothing has been changed.
	ErrCorrupt = errors.New("corrupt state")
	// ErrDestroyed is returned by every use of a key after its Destroy.
	ErrDestroyed = errors.New("key destroyed")
)
