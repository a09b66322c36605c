package recovery

import (
	"fmt"

	"github.com/keyward/keyward/dek"
)

// Shamir's secret sharing over GF(2^8) with the polynomial of AES (FIPS 197
// §4.2), byte by byte: share x is f(x) for a random f of degree m-1 with f(0)
// the secret. No table is indexed and no branch taken by secret bytes (a table
// lookup leaked shares in CVE-2023-25000).

// mul multiplies in GF(2^8) in constant time.
func mul(a, b byte) byte {
	var p byte
	for range 8 {
		p ^= a & -(b & 1)
		a = a<<1 ^ 0x1b&-(a>>7)
		b >>= 1
	}
	return p
}

// inverse returns 1/a, and 0 for 0: a^254, as the nonzero elements are a group
// of order 255.
func inverse(a byte) byte {
	r := byte(1)
	for range 7 { // 254 = 2+4+...+128
		a = mul(a, a)
		r = mul(r, a)
	}
	return r
}

// split returns f(1) to f(n) for a random f of degree m-1 with f(0) = secret.
func split(secret *dek.Key, m, n int) (shares []*dek.Key, err error) {
	coefficients := []*dek.Key{secret}
	defer func() {
		for _, c := range coefficients[1:] {
			c.Destroy()
		}
		if err != nil {
			destroy(shares)
			shares = nil
		}
	}()
	for len(coefficients) < m {
		c, err := dek.NewKey()
		if err != nil {
			return nil, fmt.Errorf("split key: %w", err)
		}
		coefficients = append(coefficients, c)
	}
	for x := 1; x <= n; x++ {
		y, err := evaluate(coefficients, byte(x))
		if err != nil {
			return shares, fmt.Errorf("split key: %w", err)
		}
		shares = append(shares, y)
	}
	return shares, nil
}

// evaluate returns f(x) by Horner's rule, constant coefficient first.
func evaluate(coefficients []*dek.Key, x byte) (*dek.Key, error) {
	var acc [dek.KeySize]byte
	defer clear(acc[:])
	for i := len(coefficients) - 1; i >= 0; i-- {
		err := coefficients[i].Use(func(c []byte) error {
			for j := range acc {
				acc[j] = mul(acc[j], x) ^ c[j]
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return dek.KeyFrom(acc[:])
}

// interpolate returns f(at) of the polynomial through all points (xs[i],
// ys[i]), whose xs differ: f(0) is the secret.
func interpolate(xs []byte, ys []*dek.Key, at byte) (*dek.Key, error) {
	var acc [dek.KeySize]byte
	defer clear(acc[:])
	for i, y := range ys {
		weight := byte(1)
		for j, x := range xs {
			if j != i {
				weight = mul(weight, mul(at^x, inverse(xs[i]^x)))
			}
		}
		err := y.Use(func(b []byte) error {
			for j := range acc {
				acc[j] ^= mul(weight, b[j])
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return dek.KeyFrom(acc[:])
}

func destroy(keys []*dek.Key) {
	for _, k := range keys {
		k.Destroy()
	}
}
