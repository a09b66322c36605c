package hsm

import (
	"errors"
	"fmt"

	"github.com/keyward/keyward/dek"
	"github.com/miekg/pkcs11"
)

// This file is the one place that says what a PKCS#11 code means. Codes differ
// by token and by cause for the same bad ciphertext (SoftHSM answers
// CKR_GENERAL_ERROR, NSS 0x40, 0x21 or 0x07), and some modules use those very
// codes for a dead device: so a code can say "the device is at fault", never
// "the input is".

// deviceFault reports whether err can't be about the input.
func deviceFault(err error) bool {
	rv, _ := rvOf(err)
	switch rv {
	case pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_DEVICE_REMOVED,
		pkcs11.CKR_KEY_HANDLE_INVALID, pkcs11.CKR_OBJECT_HANDLE_INVALID,
		pkcs11.CKR_OPERATION_ACTIVE, pkcs11.CKR_OPERATION_NOT_INITIALIZED,
		pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_SESSION_COUNT, pkcs11.CKR_SESSION_HANDLE_INVALID,
		pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED,
		pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED:
		return true
	}
	return false
}

// staleHandle reports whether the object behind a kept handle may be gone.
func staleHandle(err error) bool {
	rv, ok := rvOf(err)
	return ok && (rv == pkcs11.CKR_KEY_HANDLE_INVALID || rv == pkcs11.CKR_OBJECT_HANDLE_INVALID)
}

// badPIN reports whether another login with the same PIN can only do harm.
func badPIN(err error) bool {
	rv, _ := rvOf(err)
	switch rv {
	case pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LOCKED:
		return true
	}
	return false
}

// classed returns err with a class: its own if it has one, else unavailable,
// and rebuild because the admin sessions of crypto11 are never trusted again
// after a device error.
func classed(what string, err error) error {
	if err == nil {
		return nil
	}
	for _, s := range statuses {
		if errors.Is(err, s.class) {
			return err
		}
	}
	return fmt.Errorf("%w: %w: %s: %w", dek.ErrUnavailable, errRebuild, what, err)
}
