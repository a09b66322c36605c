//go:build race

package etcdstore_test

// raceDetector: memory and time are not what they are without it.
const raceDetector = true
